"""A prompt's run: what the decoder's engine is given, and its outputs as the cache's policy wants them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kv.cache import SequenceCache
from ...kv.methods import Prune
from ...kv.selection import Selected
from ...kv.store import RowStore
from ...model.network.image_features import ImageFeatures
from ...model.spec import TextSpec
from ...package.export import bindings as names
from ...request import Prompt
from .engines import Buffers, Engines, parts_of, pool_dims, pool_of

Scores = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
_NO_ROWS = Selected("exact", np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32))


class PrunedAfter(NamedTuple):
    """The layer after which image tokens end, and how many go on."""

    layer: int
    prune: Prune


def pruned_after(cache: SequenceCache, layers: int) -> PrunedAfter | None:
    """Where the cache's policy prunes, before the last layer; at one layer at most, as the engine does."""
    found = [PrunedAfter(layer, prune) for layer in range(layers - 1) if (prune := cache.policy.prunes(layer))]
    assert len(found) <= 1, "a package prunes after one layer"
    assert not (found and cache.begin), "a shared prefix keeps its tokens for every question"
    return found[0] if found else None


class Listed:
    """The rows that a question's tokens read, those of its prefix, as the engine lists them: in each layer part by
    part. Of any other prompt there are none.

    ``formats`` of the parts; ``rows`` int32 ``[L, N]`` with room for one at least; ``offsets`` int32 ``[L, P + 1]``;
    ``order``, layer by layer, int64 ``[n]``: where the listed rows stand in the order of their positions.
    """

    def __init__(self, cache: SequenceCache, layers: int) -> None:
        before = [{each.format: each for each in cache.rows_before(layer)} for layer in range(layers)]
        self.formats = parts_of({name for of_layer in before for name in of_layer})
        parts = [[of_layer.get(name, _NO_ROWS) for name in self.formats] for of_layer in before]
        self.order = [np.concatenate([part.order for part in own]) for own in parts]
        self.offsets: Ints = np.cumsum([[0, *(len(part.ids) for part in own)] for own in parts], axis=1, dtype=np.int32)
        self.rows: Ints = np.zeros((layers, max(1, *self.offsets[:, -1])), dtype=np.int32)
        for layer, own in enumerate(parts):
            self.rows[layer, : self.count(layer)] = np.concatenate([part.ids for part in own])

    def count(self, layer: int) -> int:
        """How many rows are listed in a layer."""
        return len(self.order[layer])


def buffers(
    engines: Engines,
    store: RowStore,
    prompt: Prompt,
    features: ImageFeatures | None,
    cache: SequenceCache,
    listed: Listed,
) -> Buffers:
    """Memory for the run of a whole prompt, or of a question's own tokens over the rows that are ``listed``, its inputs
    filled in. Its outputs hold all layers' keys and values of these tokens."""
    text, device, length = engines.spec.text, store.keys.device, len(prompt) - cache.begin
    flat = torch.zeros(1, text.hidden_size, dtype=store.keys.dtype, device=device)
    if features is not None:
        flat = features.tokens
    is_image = cache.is_image(0)[-length:]
    pruned = pruned_after(cache, text.layers)
    survivors = length if pruned is None else length - int(is_image.sum()) + pruned.prune.images
    queries = _queries(cache, listed, text.layers)
    parts = len(listed.formats)

    def table(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    given = {
        names.TOKEN_IDS: table(prompt.token_ids[cache.begin :]),
        names.FEATURES: flat,
        names.FEATURE_ROWS: table(np.where(is_image, np.cumsum(is_image) - 1, -1)),
        names.POSITIONS: table(np.arange(cache.begin, len(prompt))),
        names.TOKEN_OFFSETS: table([0, length]),
        names.SLOTS: torch.full((text.layers, parts * length), -1, dtype=torch.int32, device=device),
        names.ROWS: table(listed.rows),
        names.ROW_OFFSETS: table(listed.offsets),
        names.SMOOTHING: table(np.repeat(cache.rows.smoothing[:, None], length, axis=1)),
        names.SCORE_QUERIES: table(queries),
        names.PINNED: table(~is_image),
        **pool_of(store),
    }
    dims = {
        **pool_dims(store),
        "T": length,
        "P * T": parts * length,
        "F": len(flat),
        "B": 1,
        "B + 1": 2,
        "P * B + 1": parts + 1,
        "N": listed.rows.shape[1],
        "W": len(queries),
        "M": survivors,
        names.SURVIVORS: survivors,
    }
    bindings = engines.decoder_bindings
    taken = [each for each in (*bindings.inputs, *bindings.outputs) if each.name != names.SURVIVORS]
    return Buffers(taken, dims, device, given)


def _queries(cache: SequenceCache, listed: Listed, layers: int) -> list[int]:
    """The tokens whose attention the engine sums, the same in all layers; none where no policy looks at any scores."""
    asked = [
        queries - listed.count(layer) for layer in range(layers) if (queries := cache.prompt_queries(layer)) is not None
    ]
    summed = max(asked, key=len, default=np.empty(0, dtype=np.int64))
    assert all(len(queries) == 0 or np.array_equal(queries, summed) for queries in asked), "layers ask different things"
    return summed.tolist() if len(summed) else [-1] if asked else []  # -1 is nobody: only the last token's are wanted


def scores_of(run: Buffers, text: TextSpec, cache: SequenceCache, listed: Listed) -> list[tuple[Scores, Scores]]:
    """Each layer's last and total attention ``[m]``, on the host, of the listed rows in the order of their positions,
    then of the tokens: zero for what the policy did not ask for."""
    results = [run[names.ROW_SCORES], *(run[names.TOKEN_SCORES.format(layer)] for layer in range(text.layers))]
    # One copy for all layers.
    flat = torch.cat([each.flatten() for each in results]).cpu().numpy()
    rows, *tokens = np.split(flat, np.cumsum([each.numel() for each in results])[:-1])
    scores = []
    for layer, (of_rows, of_tokens) in enumerate(zip(rows.reshape(text.layers, 2, -1), tokens, strict=True)):
        order, queries = listed.order[layer], cache.prompt_queries(layer)
        both = np.concatenate([np.empty((2, len(order)), np.float32), of_tokens.reshape(2, -1)], axis=1)
        both[:, order] = of_rows[:, : len(order)]
        if queries is None:
            both[0] = 0
        if queries is None or not len(queries):
            both[1] = 0
        scores.append((both[0], both[1]))
    return scores
