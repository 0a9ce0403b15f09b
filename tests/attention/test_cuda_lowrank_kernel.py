"""The CUDA kernel for low-rank rows: its source run on the CPU, against float64.

The reference decodes the same records, multiplies them with the same bases and turns keys as complex numbers, all in
float64, so that what is compared is the kernel's arithmetic, not the format's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_edge.attention.cuda import LOW_RANK
from avl_edge.attention.kernels import Part
from avl_edge.config import KvShape
from avl_edge.kv.layout import UNIT, Format
from tests.equipment.emulated_kernels import Kernels, LowRankPart, Shape
from tests.equipment.emulated_parts import check, compiled, make_part, make_query

SHAPES = {
    Shape(64, 1, torch.float16): ("exact", "int4", LOW_RANK),
    Shape(24, 3, torch.bfloat16): ("exact", LOW_RANK),
    Shape(80, 4, torch.bfloat16): ("exact", LOW_RANK),
    Shape(96, 2, torch.float16): ("exact", LOW_RANK),
    Shape(128, 8, torch.float16, warps=1): ("exact", LOW_RANK),
    Shape(256, 2, torch.bfloat16, warps=4): ("exact", LOW_RANK),
}
SMALL = next(iter(SHAPES))
CONTEXT = 700


@pytest.fixture(scope="module")
def kernels(shared_folder: Path) -> Callable[[Shape], Kernels]:
    """``kernels(shape)``: compiled for its formats."""
    return compiled(SHAPES, shared_folder)


def make_low_rank(
    shape: Shape,
    name: str,
    counts: Sequence[int],
    kv_heads: int,
    seed: int,
    pool: int = 30,
    most: int = 0,
    smooths: bool = False,
) -> LowRankPart:
    """Random records of a format, listed ``counts`` times by each sequence, over a basis for each sequence; ``most``
    ids of it stand in the table. Where the keys are to be smoothed, those of all sequences but the last are. All bytes
    that are no listed record, no basis, no smoothing and no coefficient are those of a NaN.
    """
    random, form, batch = torch.Generator().manual_seed(seed), Format(name), len(counts)
    rank, read, width = form.basis_rows, form.read_rank, kv_heads * shape.dim
    size = form.record_bytes(KvShape(1, kv_heads, shape.dim, 2))
    step, exact = size // UNIT + 1, batch * rank + 3
    first = exact * width * 2 // UNIT + 1
    chosen = torch.randint(pool, (sum(counts),), generator=random)
    places = torch.randperm(exact, generator=random)
    bases, free = places[: batch * rank].view(batch, rank), places[batch * rank :]
    smoothing = torch.tensor([int(free[b % 3]) if b < batch - 1 else -1 for b in range(batch)], dtype=torch.int32)
    arenas = []
    for kind in ("keys", "values"):
        arena = torch.full(((first + pool * step) * UNIT,), 255, dtype=torch.uint8)
        directions = torch.randn(batch, read, width, generator=random) * read**-0.5
        arena[: exact * width * 2].view(exact, -1)[bases[:, :read]] = directions.to(shape.dtype).view(torch.uint8)
        if smooths:  # a center in the keys, a scale in the values
            own = torch.randn(3, width, generator=random)
            own = own if kind == "keys" else own.sigmoid()
            arena[: exact * width * 2].view(exact, -1)[free] = own.to(shape.dtype).view(torch.uint8)
        coefficients = torch.randn(pool, rank, generator=random)
        if form.packs_coefficients:
            scales = (torch.rand(pool, 1, generator=random) / 64).half()
            numbers = torch.randint(-127, 128, (pool, rank), generator=random).to(torch.int8)
            bytes_ = torch.cat([scales.view(torch.uint8), numbers.view(torch.uint8)], 1)
        else:
            bytes_ = coefficients.to(shape.dtype).view(torch.uint8)
        arena[first * UNIT :].view(pool, -1)[chosen, : bytes_.shape[1]] = bytes_[chosen]
        arenas.append(arena)
    positions = torch.randint(CONTEXT, (len(chosen),), generator=random, dtype=torch.int32)
    table = torch.full((batch, max(most, read)), 2**30, dtype=torch.int32)
    table[:, :read] = bases[:, :read]
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    rows = (first + chosen * step).int()
    used = smoothing if smooths else None
    return LowRankPart(name, *arenas, rows, offsets, positions, table, angles(shape), used)


def angles(shape: Shape) -> Tensor:
    """Cosines and sines ``[context, 2, d / 2]`` of the plain RoPE, with a magnitude as YaRN has one."""
    frequencies = 10000.0 ** -(torch.arange(0, shape.dim, 2, dtype=torch.float64) / shape.dim)
    turns = torch.arange(CONTEXT, dtype=torch.float64)[:, None] * frequencies
    return (torch.stack([turns.cos(), turns.sin()], 1) * 1.2).to(shape.dtype)


def dense(part: LowRankPart, shape: Shape, kv_heads: int) -> Part:
    """The listed rows as exact ones in float64, each with a row of its own."""
    form = Format(part.format)
    rank, listed, found = form.read_rank, part.rows.long() * UNIT, []
    owners = torch.repeat_interleave(torch.arange(len(part.bases)), part.offsets.diff())
    for arena in (part.keys, part.values):
        if form.packs_coefficients:
            scales = arena[listed[:, None] + torch.arange(2)].view(torch.float16).double()
            coefficients = arena[listed[:, None] + 2 + torch.arange(rank)].view(torch.int8).double() * scales
        else:
            coefficients = arena[listed[:, None] + torch.arange(2 * rank)].view(shape.dtype).double()
        bases = _exact_rows(arena, shape, kv_heads)[part.bases[:, :rank].long()].double()
        found.append(torch.einsum("nr,nrhd->nhd", coefficients, bases[owners]))
    turns = torch.complex(*part.angles[part.positions.long()].double().unbind(1))[:, None]
    turned = torch.complex(*found[0].split(shape.dim // 2, -1)) * turns
    keys = torch.cat([turned.real, turned.imag], -1)
    if part.smoothing is not None:
        for row, own in zip(part.smoothing.tolist(), keys.tensor_split(part.offsets[1:-1].long()), strict=True):
            if row >= 0:
                center, scale = (_exact_rows(arena, shape, kv_heads)[row] for arena in (part.keys, part.values))
                own -= center.double()
                own /= scale.double()
    return Part("exact", keys, found[1], torch.arange(len(listed), dtype=torch.int32), part.offsets)


def _exact_rows(arena: Tensor, shape: Shape, kv_heads: int) -> Tensor:
    """The whole arena as rows ``[n, H_kv, d]``."""
    row_bytes = 2 * kv_heads * shape.dim
    return arena[: len(arena) // row_bytes * row_bytes].view(shape.dtype).view(-1, kv_heads, shape.dim)


def check_parts(
    shape: Shape, query: Tensor, parts: Sequence[Part], kv_heads: int, out: Tensor, scores: Sequence[Tensor] | None
) -> None:
    every = [dense(part, shape, kv_heads) if isinstance(part, LowRankPart) else part for part in parts]
    check(query, every, kv_heads, out, scores)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "smooths"), [("lowrank:70", False), ("lowrank:17@5+int8", True)])
def test_counts_at_the_borders_of_tiles_and_splits(
    kernels: Callable[[Shape], Kernels], shape: Shape, name: str, smooths: bool
) -> None:
    """Empty selections, one row, and whole tiles of a warp and of a block, and a row less or more."""
    turn = 2 * shape.tile * shape.warps  # a warp rebuilds two tiles at once
    counts = [0, 1, 2 * shape.tile - 1, 2 * shape.tile + 1, turn, 0, 2 * turn + 1]
    kv_heads = 3 if shape.dim < 40 else 2
    part = make_low_rank(shape, name, counts, kv_heads, seed=1, smooths=smooths)
    query = make_query(shape, len(counts), kv_heads, seed=2)
    out, scores = kernels(shape).attend_parts(query, [part], kv_heads, splits=2)
    check_parts(shape, query, [part], kv_heads, out, scores)
    assert not out[[0, 5]].any()
    assert scores is not None
    assert scores[0][0] == 1, "the only row has all the weight"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_ranks_beside_any_formats(kernels: Callable[[Shape], Kernels], data: st.DataObject) -> None:
    """Of different ranks, of which a step reads all or some, coefficients in int8, beside exact and packed rows."""
    shape = data.draw(st.sampled_from(list(SHAPES)), "shape")
    batch, kv_heads, seed = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 2), (0, 2**32)))
    counts = st.lists(st.sampled_from((0, 0, 1, 2, 7, 20, 45)), min_size=batch, max_size=batch)
    parts: list[Part] = [
        make_part(shape, name, data.draw(counts, name), kv_heads, seed + number)
        for number, name in enumerate(SHAPES[shape][:-1])
    ]
    for number in range(data.draw(st.integers(1, 2), "low-rank formats")):
        rank = data.draw(st.integers(1, kv_heads * shape.dim), "rank")
        read = data.draw(st.integers(1, rank), "read")
        name = f"lowrank:{rank}@{read}" + "+int8" * data.draw(st.booleans(), "packed")
        more = data.draw(st.integers(0, 9), "more of a basis")
        drawn, smooths = data.draw(counts, name), data.draw(st.booleans(), "smooths")
        sizes = {"most": read + more, "smooths": smooths}
        parts.append(make_low_rank(shape, name, drawn, kv_heads, seed - number, **sizes))
    query = make_query(shape, batch, kv_heads, seed, data.draw(st.sampled_from((0.1, 1.0, 6.0)), "sharpness"))
    out, scores = kernels(shape).attend_parts(query, parts, kv_heads, splits=data.draw(st.integers(1, 3), "splits"))
    check_parts(shape, query, parts, kv_heads, out, scores)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_whole_basis(kernels: Callable[[Shape], Kernels], shape: Shape) -> None:
    """As many directions as a row has numbers, and every row read by every sequence."""
    kv_heads, batch, pool = 2, 2, 9
    name = f"lowrank:{kv_heads * shape.dim}"
    part = make_low_rank(shape, name, [pool] * batch, kv_heads, seed=3, pool=1)
    query = make_query(shape, batch, kv_heads, seed=4)
    out, scores = kernels(shape).attend_parts(query, [part], kv_heads, splits=1)
    check_parts(shape, query, [part], kv_heads, out, scores)


def test_a_sequence_does_not_depend_on_others_on_scores_or_the_order_of_blocks(
    kernels: Callable[[Shape], Kernels],
) -> None:
    first = make_part(SMALL, "exact", [3, 0, 9], 2, seed=5)
    part = make_low_rank(SMALL, "lowrank:66@65", [40, 80, 5], 2, seed=6)
    query, run = make_query(SMALL, 3, 2, seed=7), kernels(SMALL).attend_parts
    out, scores = run(query, [first, part], 2, splits=3)
    backwards, again = run(query, [first, part], 2, splits=3, backwards=True)
    assert torch.equal(out, backwards)
    assert scores is not None
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(scores, again, strict=True))
    assert torch.equal(out, run(query, [first, part], 2, splits=3, scores=False)[0])
    begin, end = part.offsets[1:3].tolist()
    lists = (part.rows[begin:end], torch.tensor([0, end - begin], dtype=torch.int32), part.positions[begin:end])
    only = LowRankPart(part.format, part.keys, part.values, *lists, part.bases[1:2].contiguous(), part.angles)
    alone, own = run(query[1:2].contiguous(), [only], 2, splits=3)
    assert own is not None
    assert torch.equal(out[1:2], alone)
    assert torch.equal(scores[1][begin:end], own[0])


@pytest.mark.parametrize("name", ["lowrank:9", "lowrank:9+int8"])
@pytest.mark.parametrize("spoiled", ["keys", "values"])
@pytest.mark.parametrize("what", ["a coefficient", "a direction"])
def test_a_nan_in_what_is_read_is_not_hidden(
    kernels: Callable[[Shape], Kernels], name: str, spoiled: str, what: str
) -> None:
    part, query = make_low_rank(SMALL, name, [20, 20], 2, seed=8), make_query(SMALL, 2, 2, seed=9)
    part.rows[20:] = part.rows[0]  # the second sequence does not read the row
    arena, row = getattr(part, spoiled), 2 * 2 * SMALL.dim
    coefficient = int(part.rows[3]) * UNIT + (0 if "int8" in name else 2 * 4)
    direction = int(part.bases[0, 4]) * row + row // 2  # of the second head
    begin = coefficient if what == "a coefficient" else direction
    arena[begin : begin + 2] = 255
    out, _ = kernels(SMALL).attend_parts(query, [part], 2, splits=2)
    assert out[0, 1].isnan().any()
    assert out[0, 0].isnan().any() == (what == "a coefficient"), "all heads share a row's coefficients"
    assert not out[1].isnan().any()


def test_a_value_is_what_it_stands_for(kernels: Callable[[Shape], Kernels]) -> None:
    """One row of one direction has all the weight: its value is that direction, as often as it says, bit for bit."""
    part = make_low_rank(SMALL, "lowrank:1", [1, 1], 2, seed=10)
    assert part.rows[0] != part.rows[1]
    factors, width = (2.0, -0.5), 2 * 2 * SMALL.dim
    for row, factor in zip(part.rows.tolist(), factors, strict=True):
        part.values[row * UNIT : row * UNIT + 2] = torch.tensor([factor], dtype=SMALL.dtype).view(torch.uint8)
    out, _ = kernels(SMALL).attend_parts(make_query(SMALL, 2, 2, seed=11), [part], 2, splits=1)
    for own, basis, factor in zip(out, part.bases[:, 0].tolist(), factors, strict=True):
        direction = part.values[basis * width : (basis + 1) * width].view(SMALL.dtype)
        assert torch.equal(own.flatten(), direction * factor)
