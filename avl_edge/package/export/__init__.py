"""A checkpoint as ONNX graphs: what an engine is built from. This text is the table of their bindings.

Dimensions: I images, S pixels a side, J tokens of an image; B sequences, T new tokens of all of them together, F image
feature rows, N row ids (room for the longest list of all layers), P row formats, R rows of the pool, U units of 16
bytes in an arena of it, W score queries, M survivors; L layers, H_kv key/value heads, d head size, V vocabulary.
"model" is the dtype of the weights, which the recipe may change; M' is T up to the layer that prunes and M beyond it.

``vision.onnx``: the vision tower and the projector.

| vision | name | shape | dtype |
|---|---|---|---|
| in | pixels | I, 3, S, S | float32 |
| out | features | I, J, hidden | model |

``decoder.onnx``: embedding, layers and head; one graph for the prompt and for a decode step.

| decoder | name | shape | dtype |
|---|---|---|---|
| in | token_ids | T | int32 |
| in | features | F, hidden | model |
| in | feature_rows | T | int32 |
| in | positions | T | int32 |
| in | token_offsets | B + 1 | int32 |
| in | slots | L, P * T | int32 |
| in | rows | L, N | int32 |
| in | row_offsets | L, P * B + 1 | int32 |
| in | smoothing | L, T | int32 |
| in | score_queries | W | int32 |
| in | pinned | T | int32 |
| in | survivors | 1 | int64 |
| in | pool_keys | R, H_kv, d | model |
| in | pool_values | R, H_kv, d | model |
| in | pool_key_words | U, 4 | int32 |
| in | pool_value_words | U, 4 | int32 |
| out | logits | B, V | float32 |
| out | row_scores | L, 2, N | float32 |
| out | kept | M | int32 |
| out | key.N | M', H_kv, d | model |
| out | value.N | M', H_kv, d | model |
| out | token_scores.N | 2, M' | float32 |

- Sequence b owns the tokens from ``token_offsets[b]`` up to ``token_offsets[b + 1]``, at least one, and in layer l a
  list of ids of ``rows[l]`` in each of P parts. Part p holds rows of the p-th of
  :data:`avl_edge.attention.cuda.FORMATS`; lists stand part by part, number p * B + b from ``row_offsets[l, p * B + b]``
  up to ``row_offsets[l, p * B + b + 1]``. What lies past the last offset is room: any id, read by nobody.
- With P = 1 rows are exact. An exact row's id is its number in ``pool_keys`` and ``pool_values``; a packed row's is
  where its record begins (:mod:`avl_edge.kv.formats`), in units, in the same memory, which ``pool_key_words`` and
  ``pool_value_words`` show once more: they are bound to the same addresses. All values lie right behind all keys, so
  that a record of both may begin in either (:mod:`avl_edge.kv.layout`). A decoder whose rows are too small to be
  packed has no words, no ``smoothing``, and dimensions T and B + 1 for P * T and P * B + 1.
- ``smoothing[l, t]`` is the exact row by which the keys of token t's sequence are smoothed in layer l, -1 where they
  are not (:mod:`avl_edge.kv.smoothing`): attention takes (key - center) / scale for the token's key, center and scale
  that row of ``pool_keys`` and of ``pool_values``, and query * scale for its query. So smoothed keys go into slots,
  while ``key.N`` is as the model makes it, whatever ``smoothing`` says.
- ``feature_rows[t]`` is the row of ``features`` that stands in the place of token t's embedding, -1 for text. Both are
  looked up for every token: F is at least 1, also without an image, and an image's ids are ids of the vocabulary.
- ``slots[l, p * T + t]`` is the pool row of part p's format that token t takes in layer l, handed out before the step,
  in one part at most. It is written first, then read where ``rows`` names it, as it is stored: that is a decode step. A
  negative slot writes nothing: a token without any is read by itself and by the later tokens of its sequence, beside
  the rows that are listed. That is a prompt, whose rows are chosen when its scores are known, from ``key.N`` and
  ``value.N`` (after RoPE). One that lists rows is a question over a shared prefix: those are the prefix's.
- ``row_scores[l, 0]`` is the attention that the listed rows received from the last token of their sequence, the mean
  over heads, and ``row_scores[l, 1]`` the sum over ``score_queries`` (indices of tokens, one given twice counts twice,
  -1 is nobody, as in a decode step, whose sums are zero); ``token_scores.N`` are the same for tokens without a slot.
  With W = 0 nobody looks at scores, and they may hold anything.
- After layer ``prune_after`` of the recipe only ``survivors`` tokens go on: those with ``pinned`` 1, then those of most
  attention from the last token, ties to the lower index; ``kept`` holds their indices, ascending. ``survivors`` = T
  keeps all, as it must for more than one sequence. Score queries and the last token have to survive. Without
  ``prune_after`` the inputs ``pinned`` and ``survivors`` and the output ``kept`` are not there. TensorRT's TopK ends at
  3,840, and so does a prompt in a graph that can prune.

Attention is the node ``avl::CoreAttention``. ``decoder.onnx`` brings its reference body as a function of the model, so
that any ONNX runtime can run the graph; the body leaves the pool as it is, whoever runs it writes the rows.
``decoder.plugin.onnx`` is the same graph without the body, over the same weights file, for TensorRT: up to 10.6 its
parser takes a function of the model before a plugin of the same name. The plugin writes the rows that have a slot, and
reads packed rows, P above 1, in decoders of 16 bits.
"""

from .bindings import Binding, Bindings, decoder_bindings, row_formats, vision_bindings
from .files import DECODER, PLUGIN_DECODER, PRECISIONS, VISION, ExportPlan, Settings, export_model, plan_export

__all__ = [
    "DECODER",
    "PLUGIN_DECODER",
    "PRECISIONS",
    "VISION",
    "Binding",
    "Bindings",
    "ExportPlan",
    "Settings",
    "decoder_bindings",
    "export_model",
    "plan_export",
    "row_formats",
    "vision_bindings",
]
