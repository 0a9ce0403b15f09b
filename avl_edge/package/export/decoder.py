"""``decoder.onnx``: the LLaMA family's decoder around ``avl::CoreAttention`` nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...model.network.rope import Rope
from ...model.spec import TextSpec
from . import bindings as names
from .core_attention import DOMAIN, OPERATOR, inputs
from .graph import Graph
from .layers import activation, linear, rms_norm


@dataclass(frozen=True)
class _Flow:
    """What goes from layer to layer: one row per token that is still there, and the lists that count tokens."""

    hidden: str
    cos: str
    sin: str
    slots: str
    smoothing: str
    token_offsets: str
    score_queries: str


def build_decoder(graph: Graph, spec: TextSpec, prune_after: int | None) -> None:
    """Add the nodes from ``token_ids`` to ``logits``; attention is one node a layer."""
    cos, sin = _angles(graph, spec)
    lists = (names.SLOTS, names.SMOOTHING, names.TOKEN_OFFSETS, names.SCORE_QUERIES)
    flow = _Flow(_embed(graph, spec), cos, sin, *lists)
    row_scores = []
    for layer in range(spec.layers):
        graph.scope = f"layer.{layer}/"
        hidden, rows, tokens = _layer(graph, spec, layer, flow)
        row_scores.append(graph.add("Unsqueeze", rows, graph.constant([0])))
        flow = replace(flow, hidden=hidden)
        if layer == prune_after:
            flow = _prune(graph, spec, flow, tokens)
    graph.scope = "head/"
    graph.add("Concat", *row_scores, axis=0, name=names.ROW_SCORES)
    ends = graph.add("Slice", flow.token_offsets, graph.constant([1]), graph.constant([2**31 - 1]), graph.constant([0]))
    last = graph.add("Gather", flow.hidden, graph.add("Sub", ends, graph.constant(1, "int32")), axis=0)
    normed = rms_norm(graph, "text.norm", last, spec.hidden_size, spec.norm_eps)
    sizes = spec.vocab_size, spec.hidden_size
    tied = spec.tied_head and not graph.has("head")
    terms = [graph.weight("text.embed_tokens.weight", *sizes)] if tied else graph.linear("head", *sizes, bias=False)
    logits = graph.add("Gemm", normed, *terms, transB=1)
    graph.add("Cast", logits, to=graph.onnx.TensorProto.FLOAT, name=names.LOGITS)


def _embed(graph: Graph, spec: TextSpec) -> str:
    """``[T, hidden]``: a token's own embedding, or the image feature that stands in its place."""
    table = graph.weight("text.embed_tokens.weight", spec.vocab_size, spec.hidden_size)
    zero = graph.constant(0, "int32")
    is_image = graph.add("GreaterOrEqual", names.FEATURE_ROWS, zero)
    image = graph.add("Gather", names.FEATURES, graph.add("Max", names.FEATURE_ROWS, zero), axis=0)
    text = graph.add("Gather", table, names.TOKEN_IDS, axis=0)
    return graph.add("Where", graph.add("Unsqueeze", is_image, graph.constant([1])), image, text)


def _angles(graph: Graph, spec: TextSpec) -> tuple[str, str]:
    """RoPE's cosines and sines ``[T, 1, d]``, looked up: no engine gets to compute them in a dtype of its own.

    The sines of the first half are negative: then a rotation is x * cos + (x with its halves swapped) * sin.
    """
    cos, sin = Rope(spec.head_dim, spec.rope).angles(torch.arange(spec.context), torch.float32)
    sin = torch.cat([-sin[..., : spec.head_dim // 2], sin[..., spec.head_dim // 2 :]], dim=-1)
    tables = graph.tensor("rope.cos", cos), graph.tensor("rope.sin", sin)
    of_cos, of_sin = (graph.add("Gather", table, names.POSITIONS, axis=0) for table in tables)
    return of_cos, of_sin


def _layer(graph: Graph, spec: TextSpec, layer: int, flow: _Flow) -> tuple[str, str, str]:
    """The layer's output, the scores of the rows and those of the tokens."""
    name, size = f"text.layers.{layer}", spec.hidden_size
    formats = names.row_formats(spec, graph.dtype)
    query, key, value = _project(graph, spec, layer, flow)
    if len(formats) > 1:
        query, key = _smooth(graph, spec, layer, flow, query, key)
    own = {"query": query, "key": key, "value": value, names.SLOTS: flow.slots}
    own |= {names.TOKEN_OFFSETS: flow.token_offsets, names.SCORE_QUERIES: flow.score_queries}
    attended, rows, tokens = graph.add_many(
        OPERATOR,
        [own.get(name, name) for name in inputs(formats)],
        [f"attended.{layer}", f"row_scores.{layer}", names.TOKEN_SCORES.format(layer)],
        domain=DOMAIN,
        layer=layer,
    )
    width = spec.heads * spec.head_dim
    flat = graph.add("Reshape", attended, graph.constant([-1, width]))
    hidden = graph.add(
        "Add", flow.hidden, linear(graph, f"{name}.self_attn.o_proj", flat, size, width, bias=spec.out_bias)
    )
    normed = rms_norm(graph, f"{name}.post_attention_layernorm", hidden, size, spec.norm_eps)
    return graph.add("Add", hidden, _mlp(graph, spec, f"{name}.mlp", normed)), rows, tokens


def _project(graph: Graph, spec: TextSpec, layer: int, flow: _Flow) -> tuple[str, str, str]:
    """Query ``[t, H, d]``, key and value ``[t, H_kv, d]``; the latter two are outputs of the graph."""
    name, size = f"text.layers.{layer}", spec.hidden_size
    normed = rms_norm(graph, f"{name}.input_layernorm", flow.hidden, size, spec.norm_eps)

    def heads(part: str, count: int, output: str | None = None) -> str:
        flat = linear(graph, f"{name}.self_attn.{part}_proj", normed, count * spec.head_dim, size, bias=spec.qkv_bias)
        return graph.add("Reshape", flat, graph.constant([-1, count, spec.head_dim]), name=output)

    query = _rotate(graph, spec, heads("q", spec.heads), flow)
    key = _rotate(graph, spec, heads("k", spec.kv_heads), flow, names.KEY.format(layer))
    return query, key, heads("v", spec.kv_heads, names.VALUE.format(layer))


def _smooth(graph: Graph, spec: TextSpec, layer: int, flow: _Flow, query: str, key: str) -> tuple[str, str]:
    """Query and key as stored keys are met and stored, where a token's sequence smooths its keys."""
    row = graph.add("Gather", flow.smoothing, graph.constant(layer), axis=0)
    has_one = graph.add("GreaterOrEqual", row, graph.constant(0, "int32"))
    has_one = graph.add("Unsqueeze", has_one, graph.constant([1, 2]))
    first = graph.add("Max", row, graph.constant(0, "int32"))  # which may be anything where there is none
    center, scale = (
        graph.add("Where", has_one, graph.add("Gather", pool, first, axis=0), graph.constant(nothing, graph.dtype))
        for pool, nothing in ((names.POOL_KEYS, 0.0), (names.POOL_VALUES, 1.0))
    )
    key = graph.add("Div", graph.add("Sub", key, center), scale)
    by_key = graph.constant([-1, spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim])
    scaled = graph.add("Mul", graph.add("Reshape", query, by_key), graph.add("Unsqueeze", scale, graph.constant([2])))
    return graph.add("Reshape", scaled, graph.constant([-1, spec.heads, spec.head_dim])), key


def _rotate(graph: Graph, spec: TextSpec, x: str, flow: _Flow, output: str | None = None) -> str:
    half = spec.head_dim // 2
    first, second = graph.add_many("Split", [x, graph.constant([half, half])], [f"{x}/first", f"{x}/second"], axis=-1)
    swapped = graph.add("Concat", second, first, axis=-1)
    return graph.add("Add", graph.add("Mul", x, flow.cos), graph.add("Mul", swapped, flow.sin), name=output)


def _mlp(graph: Graph, spec: TextSpec, name: str, x: str) -> str:
    size, inner, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
    gate = activation(graph, spec.activation, linear(graph, f"{name}.gate_proj", x, inner, size, bias=bias))
    gated = graph.add("Mul", gate, linear(graph, f"{name}.up_proj", x, inner, size, bias=bias))
    return linear(graph, f"{name}.down_proj", gated, size, inner, bias=bias)


def _prune(graph: Graph, spec: TextSpec, flow: _Flow, token_scores: str) -> _Flow:
    """Let the survivors go on: gather what has a row per token, and count anew what points at tokens."""
    last = graph.add("Gather", token_scores, graph.constant(0), axis=0)
    # Weights are at most 1: a pinned token stands above every other.
    bonus = graph.add("Mul", graph.cast(names.PINNED, "float32"), graph.constant(2.0, "float32"))
    _, best = graph.add_many(
        "TopK", [graph.add("Add", last, bonus), names.SURVIVORS], ["prune/score", "prune/best"], axis=0
    )
    ascending = graph.cast(best, "float32")
    order, _ = graph.add_many("TopK", [ascending, names.SURVIVORS], ["prune/order", "prune/ignored"], axis=0, largest=0)
    kept = graph.add("Cast", order, to=graph.onnx.TensorProto.INT32, name=names.KEPT)
    hidden, cos, sin = (graph.add("Gather", rows, kept, axis=0) for rows in (flow.hidden, flow.cos, flow.sin))
    packs = len(names.row_formats(spec, graph.dtype)) > 1
    return _Flow(
        hidden,
        cos,
        sin,
        slots=_slots_of(graph, flow.slots, kept),
        smoothing=graph.add("Gather", flow.smoothing, kept, axis=1) if packs else flow.smoothing,
        token_offsets=_renumber(graph, flow.token_offsets, kept),
        score_queries=_renumber(graph, flow.score_queries, kept),
    )


def _slots_of(graph: Graph, slots: str, kept: str) -> str:
    """The survivors' slots in each part."""
    count = graph.add("Shape", names.TOKEN_IDS)
    by_part = graph.add("Concat", graph.constant([0, -1]), count, axis=0)
    own = graph.add("Gather", graph.add("Reshape", slots, by_part), kept, axis=2)
    return graph.add("Reshape", own, graph.constant([0, -1]))


def _renumber(graph: Graph, index: str, kept: str) -> str:
    """A token's index among the survivors is the number of them before it; -1 stays."""
    before = graph.add(
        "Less", graph.add("Unsqueeze", kept, graph.constant([0])), graph.add("Unsqueeze", index, graph.constant([1]))
    )
    count = graph.add("ReduceSum", graph.cast(before, "int32"), graph.constant([1]), keepdims=0)
    return graph.add("Where", graph.add("Less", index, graph.constant(0, "int32")), index, count)
