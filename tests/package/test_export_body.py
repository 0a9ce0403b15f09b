"""The body of the attention node, on its own: random calls against float64, and packed rows to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.attention.cuda import FORMATS
from avl_edge.config import KvShape
from avl_edge.kv.formats import decode, encode
from avl_edge.kv.layout import UNIT, Format
from avl_edge.package.export.core_attention import OUTPUTS, WORDS, inputs, reference_function
from avl_edge.package.export.graph import Nodes
from avl_edge.package.export.packed_rows import PackedRows

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

Array = npt.NDArray[Any]


def body_session(heads: int, kv_heads: int, dim: int, formats: Sequence[str]) -> Any:
    """One node with its body, on its own; layer 1 of 2."""
    shapes = {
        "query": ("t", heads, dim),
        **dict.fromkeys(("key", "value"), ("t", kv_heads, dim)),
        **dict.fromkeys(("pool_keys", "pool_values"), ("R", kv_heads, dim)),
        "rows": (2, "N"),
        "row_offsets": (2, "lists"),
        "slots": (2, "places"),
        "token_offsets": ("B1",),
        "score_queries": ("W",),
        **dict.fromkeys(WORDS, ("U", 4)),
    }
    names = inputs(formats)
    kinds = {name: 1 if name in ("query", "key", "value", "pool_keys", "pool_values") else 6 for name in names}
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("CoreAttention", list(names), list(OUTPUTS), domain="avl", layer=1)],
        "body",
        [info(name, kinds[name], shapes[name]) for name in names],
        [info("attended", 1, ("t", heads, dim)), info("row_scores", 1, (2, "N")), info("token_scores", 1, (2, "t"))],
    )
    return session_of(graph, [reference_function(heads, kv_heads, dim, formats)])


def session_of(graph: Any, functions: Sequence[Any] = ()) -> Any:
    opsets = [onnx.helper.make_opsetid("", 19), onnx.helper.make_opsetid("avl", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Pool:
    """Keys and values as a pool holds them, ``[2, R, H_kv, d]``: exact rows, and records in the same memory."""

    def __init__(self, memory: Array) -> None:
        self.rows = memory.copy()
        self._heads, self._dim = memory.shape[2:]

    @property
    def units(self) -> Array:
        return self.rows.reshape(-1).view(np.uint8).reshape(-1, UNIT)

    def _records(self, format_: str, ids: Sequence[int]) -> list[tuple[Format, Array]]:
        """The formats of keys and of values, and the units of their records, ``[n, units]``."""
        form, shape = Format(format_), KvShape(1, self._heads, self._dim, 4)
        key, value = (each.record_bytes(shape) // UNIT for each in (form.keys, form.values))
        first, behind = np.array(ids, dtype=np.int64)[:, None], key if form.is_mixed else len(self.units) // 2
        return [(form.keys, first + np.arange(key)), (form.values, first + behind + np.arange(value))]

    def write(self, format_: str, row: int, *content: Array) -> None:
        """A key and a value ``[H_kv, d]``."""
        if format_ == "exact":
            self.rows[:, row] = content
            return
        for (form, units), new in zip(self._records(format_, [row]), content, strict=True):
            self.units[units] = encode(form, torch.from_numpy(new[None])).view(1, -1, UNIT).numpy()

    def read(self, format_: str, ids: Sequence[int]) -> Array:
        """``[2, n, H_kv, d]``."""
        if format_ == "exact":
            return self.rows[:, ids].astype(np.float64)
        sides = []
        for form, units in self._records(format_, ids):
            records = torch.from_numpy(self.units[units].reshape(len(ids), units.shape[1] * UNIT))
            sides.append(decode(form, records, self._heads, self._dim).double().numpy())
        return np.stack(sides)


def attention_by_hand(feeds: dict[str, Array]) -> tuple[Array, Array, Array]:
    """What the node is documented to do, one token at a time, in float64."""
    query, key, value = (feeds[name].astype(np.float64) for name in ("query", "key", "value"))
    rows, row_offsets, slots = feeds["rows"][1], feeds["row_offsets"][1], feeds["slots"][1]
    pool = Pool(np.stack([feeds["pool_keys"], feeds["pool_values"]]))
    batch = len(feeds["token_offsets"]) - 1
    parts = list(zip(FORMATS, slots.reshape(-1, len(query)), row_offsets[:-1].reshape(-1, batch), strict=False))
    for format_, own, _ in parts:
        for t, slot in enumerate(own):
            if slot >= 0:
                pool.write(format_, slot, feeds["key"][t], feeds["value"][t])
    group, homeless = query.shape[1] // key.shape[1], slots.reshape(-1, len(query)).max(0) < 0
    attended, row_scores, token_scores = np.zeros_like(query), np.zeros((2, len(rows))), np.zeros((2, len(query)))
    for b, (first, last) in enumerate(zip(*_bounds(feeds["token_offsets"]), strict=True)):
        places, listed = [], [np.zeros((2, 0, *key.shape[1:]))]
        for part, (format_, _, begins) in enumerate(parts):
            places += range(begins[b], row_offsets[part * batch + b + 1])
            ids = rows[begins[b] : row_offsets[part * batch + b + 1]].tolist()
            listed.append(pool.read(format_, ids))
        held = np.concatenate(listed, axis=1)
        for t in range(first, last):
            tokens = [u for u in range(first, t + 1) if homeless[u]]
            keys = np.concatenate([held[0], key[tokens]]).repeat(group, axis=1)
            values = np.concatenate([held[1], value[tokens]]).repeat(group, axis=1)
            if not len(keys):
                continue
            logits = np.einsum("hd,chd->hc", query[t], keys) / np.sqrt(query.shape[2])
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            attended[t] = np.einsum("hc,chd->hd", weights, values)
            mean = weights.mean(0)
            for line, times in enumerate((t == last - 1, np.count_nonzero(feeds["score_queries"] == t))):
                row_scores[line, places] += mean[: len(places)] * times
                token_scores[line, tokens] += mean[len(places) :] * times
    return attended, row_scores, token_scores


def _bounds(offsets: Array) -> tuple[list[int], list[int]]:
    return offsets[:-1].tolist(), offsets[1:].tolist()


SHAPES = {
    (*shape, formats): body_session(*shape, formats)
    for shape, formats in (
        ((4, 4, 8), tuple(FORMATS)),
        ((6, 2, 5), ("exact",)),
        ((3, 1, 16), tuple(FORMATS)),
        ((4, 2, 40), tuple(FORMATS)),
        ((2, 2, 8), ("exact",)),
    )
}
STORED, FRESH = 12, 24
"""Rows of each format that a pool holds, and places for new ones."""


Sequences = list[tuple[int, int, bool]]
"""New tokens of each sequence, rows that it lists, and whether its tokens have slots."""


def choose_rows(
    random: np.random.Generator,
    sequences: Sequences,
    places: dict[str, list[int]],
    id_of: Callable[[str, int], int],
) -> tuple[Array, list[list[int]]]:
    """Slots int32 ``[P, t]`` of new tokens, and the ids that are read, a list for each format and sequence. ``places``
    of each format: those of stored rows, then those for new ones."""
    parts, total = list(places), sum(tokens for tokens, _, _ in sequences)
    slots = np.full((len(parts), total), -1, dtype=np.int32)
    ids: list[list[list[int]]] = [[[] for _ in sequences] for _ in parts]
    free, first = {name: places[name][STORED:] for name in parts}, 0
    for b, (tokens, listed, has_slots) in enumerate(sequences):
        for _ in range(listed):
            part = int(random.integers(len(parts)))
            ids[part][b].append(id_of(parts[part], int(random.choice(places[parts[part]][:STORED]))))
        # The new rows are among those that are read, as in a decode step; here also several of one sequence.
        for token in range(first, first + tokens if has_slots else 0):
            part = int(random.integers(len(parts)))
            slots[part, token] = id_of(parts[part], free[parts[part]].pop())
            ids[part][b].append(int(slots[part, token]))
        first += tokens
    return slots, [chosen for of_part in ids for chosen in of_part]


@settings(deadline=None, max_examples=500)
@given(
    shape=st.sampled_from(list(SHAPES)),
    sequences=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9), st.booleans()), min_size=1, max_size=4),
    count=st.integers(1, len(FORMATS)),
    room=st.integers(0, 4),
    queries=st.lists(st.integers(-1, 23), max_size=6),
    seed=st.integers(0, 10**6),
)
def test_reference_body(
    shape: tuple[int, int, int, tuple[str, ...]],
    sequences: Sequences,
    count: int,
    room: int,
    queries: list[int],
    seed: int,
) -> None:
    """Sequences of new tokens and listed rows in any mixture of formats, with slots and without; room that holds no
    numbers."""
    heads, kv_heads, dim, formats = shape
    random, parts = np.random.default_rng(seed), list(FORMATS)[: min(count, len(formats))]
    draw = lambda *size: random.standard_normal(size, dtype=np.float32)  # noqa: E731
    # A packed row takes the place of up to three exact ones here, and its id counts units of bytes.
    units = 4 * kv_heads * dim // UNIT
    places = {name: random.permutation(np.arange(STORED + FRESH)).tolist() for name in parts}
    # In any order, so that rows of two formats may have the same id.
    first_of = {
        name: 3 * (STORED + FRESH) * int(at) for name, at in zip(parts, random.permutation(len(parts)), strict=True)
    }
    size = 3 * (STORED + FRESH) * len(parts) + 1
    pool = Pool(np.full((2, size, kv_heads, dim), np.nan, dtype=np.float32))

    def id_of(name: str, place: int) -> int:
        row = first_of[name] + 3 * place
        return row if name == "exact" else row * units

    for name in parts:
        for place in places[name][:STORED]:
            pool.write(name, id_of(name, place), *draw(2, kv_heads, dim))
    token_offsets = np.cumsum([0, *(tokens for tokens, _, _ in sequences)], dtype=np.int32)
    total = int(token_offsets[-1])
    slots, lists = choose_rows(random, sequences, places, id_of)
    row_offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    rows = np.array([*(row for chosen in lists for row in chosen), *[size - 1] * room], dtype=np.int32)
    flat = slots.reshape(-1)
    feeds = {
        "query": draw(total, heads, dim),
        "key": draw(total, kv_heads, dim),
        "value": draw(total, kv_heads, dim),
        "pool_keys": pool.rows[0],
        "pool_values": pool.rows[1],
        # Another layer's lists lie before this one's.
        "rows": np.stack([np.zeros_like(rows), rows]),
        "row_offsets": np.stack([np.zeros_like(row_offsets), row_offsets]),
        "slots": np.stack([np.full_like(flat, -1), flat]),
        "token_offsets": token_offsets,
        "score_queries": np.array([query for query in queries if query < total], dtype=np.int32),
    }
    if len(formats) > 1:
        feeds |= dict(zip(WORDS, np.split(pool.units.view(np.int32), 2), strict=True))
    for ours, expected in zip(SHAPES[shape].run(None, feeds), attention_by_hand(feeds), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def packed_session(format_: str, heads: int, dim: int) -> Any:
    """What is read of records, and what is left of rows that are packed, each a graph's output."""
    nodes = Nodes()
    rows = PackedRows(nodes, Format(format_), "key", heads, dim)
    outputs = {"read": rows.read("words", "ids"), "packed": rows.packed("rows")}
    for name, output in outputs.items():
        nodes.add("Identity", output, name=name)
    info = onnx.helper.make_tensor_value_info
    inputs = [info("words", 6, ("U", 4)), info("ids", 6, ("n",)), info("rows", 1, ("m", heads * dim))]
    results = [info("read", 1, ("n", heads * dim)), info("packed", 1, ("m", heads * dim))]
    return session_of(onnx.helper.make_graph(nodes.nodes, "rows", inputs, results))


PACKED = {
    (name, heads, dim): packed_session(name, heads, dim)
    for name in ("int8", "int4")
    for heads, dim in ((1, 8), (3, 2), (2, 40), (5, 64))
}


@settings(deadline=None, max_examples=150)
@given(
    session=st.sampled_from(list(PACKED)),
    scale=st.sampled_from([0.0, 1e-9, 3e-7, 1e-5, 1e-3, 1.0, 300.0, 1e6, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_packed_rows_are_those_of_the_pool_to_the_bit(
    session: tuple[str, int, int], scale: float, dtype: torch.dtype, seed: int
) -> None:
    """Read from records between bytes that are no numbers, and rounded as a record would round them: the same floats.
    Ties, the smallest scales and the largest, and scales that are no number among them."""
    name, heads, dim = session
    random = torch.Generator().manual_seed(seed)
    rows = (torch.randn(9, heads, dim, generator=random) * scale).clamp(-3e38, 3e38).to(dtype).float()
    rows[3], rows[5] = rows[3].sign() * scale, 0  # all at the end of their range, and none
    rows[7] = torch.randint(-254, 255, rows[7].shape, generator=random) / 2  # between two numbers, for a scale of one
    rows[7, :, 0] = 127 if name == "int8" else 7
    rows = rows.nan_to_num(posinf=3e38, neginf=-3e38)
    records = encode(Format(name), rows)
    decoded = decode(Format(name), records, heads, dim)
    step = records.shape[1] // UNIT + 1
    arena = torch.full((9, step, UNIT), 255, dtype=torch.uint8)
    arena[:, : step - 1] = records.view(9, step - 1, UNIT)
    arena[0] = 255  # as memory that nobody wrote
    order = torch.randperm(9, generator=random)
    feeds = {
        "words": arena.view(-1, UNIT).view(torch.int32).numpy(),
        "ids": (order * step).int().numpy(),
        "rows": rows.flatten(1).numpy(),
    }
    read, packed = (torch.from_numpy(result) for result in PACKED[session].run(None, feeds))
    expected = decoded.flatten(1)
    assert torch.equal(packed, expected)
    expected = torch.where(torch.arange(9)[:, None] == 0, torch.nan, expected)[order]
    assert torch.equal(read.isnan(), expected.isnan())
    assert torch.equal(read.nan_to_num(), expected.nan_to_num())
