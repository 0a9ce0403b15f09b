"""Packed rows in the CUDA kernels, and the choice of rows within a step: their source run on the CPU, against float64.

The reference decodes the same records in float64, so that what is compared is the kernel's arithmetic, not the format's
rounding: attention has float32's error, whatever the format.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_edge.attention.kernels import Part, coarse_weights_reference
from avl_edge.config import PromptShape
from avl_edge.kv.formats import decode, encode
from avl_edge.kv.layout import UNIT, Format, groups, padded
from avl_edge.kv.methods import Coarse
from tests.equipment.emulated_kernels import Kernels, Shape
from tests.equipment.emulated_parts import check, compiled, make_part, make_query, record_bytes, wide

SHAPES = {
    Shape(64, 1, torch.float16): ("exact", "int8", "int4", "int8/int4"),
    Shape(80, 4, torch.bfloat16): ("int8", "int4"),
    Shape(96, 2, torch.float16, warps=1): ("int4",),
    Shape(128, 8, torch.float16, warps=1): ("int8", "int8/int4"),
    Shape(256, 2, torch.bfloat16, warps=1): ("int4",),
}
SMALL = next(iter(SHAPES))
PACKED = [(shape, name) for shape, names in SHAPES.items() for name in names if name != "exact"]
every_packing = pytest.mark.parametrize(("shape", "name"), PACKED, ids=[f"{shape}-{name}" for shape, name in PACKED])


@pytest.fixture(scope="module")
def kernels(shared_folder: Path) -> Callable[[Shape], Kernels]:
    """``kernels(shape)``: compiled for its formats."""
    return compiled(SHAPES, shared_folder)


@every_packing
def test_counts_at_the_borders_of_tiles_and_splits(
    kernels: Callable[[Shape], Kernels], shape: Shape, name: str
) -> None:
    turn = shape.tile * shape.warps
    counts = [0, 1, shape.tile - 1, shape.tile + 1, 2 * turn, 2 * turn + 1, 0, 5 * turn + 3]
    part, query = make_part(shape, name, counts, 2, seed=1), make_query(shape, len(counts), 2, seed=2)
    out, scores = kernels(shape).attend_parts(query, [part], 2, splits=2)
    check(query, [part], 2, out, scores)
    assert not out[[0, 6]].any()
    assert scores is not None
    assert scores[0][0] == 1, "the only row has all the weight"


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_mixture_of_formats(kernels: Callable[[Shape], Kernels], data: st.DataObject) -> None:
    """Parts without rows, sequences of one format beside those of three, one row, no row."""
    shape = data.draw(st.sampled_from([shape for shape, names in SHAPES.items() if len(names) > 1]), "shape")
    batch, kv_heads, seed = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 2), (0, 2**32)))
    counts = st.lists(st.sampled_from((0, 0, 1, 2, 7, 20)), min_size=batch, max_size=batch)
    parts = [
        make_part(shape, name, data.draw(counts, name), kv_heads, seed + number)
        for number, name in enumerate(SHAPES[shape])
    ]
    query = make_query(shape, batch, kv_heads, seed, data.draw(st.sampled_from((0.1, 1.0, 6.0)), "sharpness"))
    out, scores = kernels(shape).attend_parts(query, parts, kv_heads, splits=data.draw(st.integers(1, 3), "splits"))
    check(query, parts, kv_heads, out, scores)


def test_a_sequence_does_not_depend_on_others_their_formats_or_the_order_of_blocks(
    kernels: Callable[[Shape], Kernels],
) -> None:
    counts = {"exact": [3, 0, 9], "int8": [0, 20, 35], "int4": [8, 0, 40]}
    parts = [make_part(SMALL, name, own, 2, seed=5) for name, own in counts.items()]
    query = make_query(SMALL, 3, 2, seed=6)
    run = kernels(SMALL).attend_parts
    out, scores = run(query, parts, 2, splits=3)
    backwards, again = run(query, parts, 2, splits=3, backwards=True)
    assert torch.equal(out, backwards)
    assert scores is not None
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(scores, again, strict=True))
    only = Part("int8", parts[1].keys, parts[1].values, parts[1].rows[:20], torch.tensor([0, 20], dtype=torch.int32))
    alone, own = run(query[1:2].contiguous(), [only], 2, splits=3)
    assert own is not None
    assert torch.equal(out[1:2], alone)
    assert torch.equal(scores[1][:20], own[0])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_nan_in_a_selected_row_is_not_hidden(kernels: Callable[[Shape], Kernels], name: str) -> None:
    part = make_part(SMALL, name, [20, 20], 2, seed=3)
    part.rows[20:] = part.rows[0]
    for arena in (part.keys, part.values):
        own = Part(name, part.keys.clone(), part.values.clone(), part.rows, part.offsets)
        spoiled = own.keys if arena is part.keys else own.values
        begin = int(part.rows[3]) * UNIT + 2 * groups(SMALL.dim) * (name == "int4") + 2 * (name == "int8")
        spoiled[begin : begin + 2] = 255  # the first scale of head 1
        out, _ = kernels(SMALL).attend_parts(make_query(SMALL, 2, 2, seed=4), [own], 2, splits=2)
        assert out[0, 1].isnan().any()
        assert not out[0, 0].isnan().any()
        assert not out[1].isnan().any()


# New rows


@every_packing
def test_append_packs_as_the_pool_does(kernels: Callable[[Shape], Kernels], shape: Shape, name: str) -> None:
    """Bit for bit, at the borders of what the format holds too; and nothing but the records is touched."""
    kv_heads, count, form = 3, 8, Format(name)
    kinds = (form.keys, form.values)
    largest, tiny = torch.finfo(shape.dtype).max, torch.finfo(shape.dtype).tiny
    rows = torch.randn(2, count, kv_heads, shape.dim, generator=torch.Generator().manual_seed(7))
    rows *= torch.tensor([1, 1e-6, 1e3, 1, 0, 1, 1e-3, 1])[:, None, None]
    rows[0, 0, 0, 0], rows[0, 1, 1, 3], rows[1, 2, 2, -1] = largest, tiny, -largest
    rows[0, 3, 1, 5], rows[1, 5, 0, 2], rows[0, 6, 2, 8] = math.inf, math.nan, -0.0
    keys, values = rows.to(shape.dtype)
    sizes = [record_bytes(kind.name, shape, kv_heads) for kind in kinds]
    step = (sum(sizes) if form.is_mixed else sizes[0]) // UNIT + 1
    slots = torch.tensor([5, -1, 0, 3, 7, 1, -1, 2], dtype=torch.int32)
    slots = torch.where(slots < 0, slots, slots * step + 1)
    memories = [torch.full(((9 * step + 1) * UNIT,), 77, dtype=torch.uint8) for _ in range(1 if form.is_mixed else 2)]
    arenas = (memories[0], memories[0][sizes[0] :] if form.is_mixed else memories[1])
    numbers = (kv_heads, 0, 0, 0, 0)
    kernels(shape).launch("avl_append", (count, 2), keys, values, slots, *numbers, *arenas, format_=name)
    untouched = [torch.ones(len(memory), dtype=torch.bool) for memory in memories]
    free = (untouched[0], untouched[0][sizes[0] :] if form.is_mixed else untouched[1])
    for arena, own_free, new, kind, size in zip(arenas, free, (keys, values), kinds, sizes, strict=True):
        for row, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            begin, expected = slot * UNIT, encode(kind, new[row : row + 1])
            own_free[begin : begin + size] = False
            got = arena[begin : begin + size][None]
            assert torch.equal(
                decode(kind, got, kv_heads, shape.dim).isnan(), decode(kind, expected, kv_heads, shape.dim).isnan()
            )
            for section, length in sections(kind.name, shape, kv_heads):
                if not new[row].isnan().any():
                    assert torch.equal(got[:, section : section + length], expected[:, section : section + length])
    for memory, own_free in zip(memories, untouched, strict=True):
        assert (memory[own_free] == 77).all(), "written outside of a record"


def sections(name: str, shape: Shape, kv_heads: int) -> list[tuple[int, int]]:
    """Where a record holds something, and how many bytes."""
    scales = 2 * kv_heads * (groups(shape.dim) if name == "int4" else 1)
    plane = kv_heads * shape.dim // 2
    planes = [(padded(scales) + number * padded(plane), plane) for number in range(2 if name == "int8" else 1)]
    return [(0, scales), *planes]


# The choice of rows within a step


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_scan_gives_the_coarse_weights(kernels: Callable[[Shape], Kernels], shape: Shape) -> None:
    """Of each format; a sequence has rows in one part at most."""
    names = SHAPES[shape]
    last = len(names) - 1
    owners = [0, *range(len(names)), last, last]  # of each sequence: the part that it scans
    sizes = [1, 5, 33, shape.tile * shape.warps * 2 + 1, 21, 0, 9]
    parts = [
        make_part(
            shape, name, [n if owner == number else 0 for owner, n in zip(owners, sizes, strict=False)], 2, number
        )
        for number, name in enumerate(names)
    ]
    query = make_query(shape, len(owners), 2, seed=8, sharpness=3)
    for part, got in zip(parts, kernels(shape).scan(query, parts, 2), strict=True):
        expected = coarse_weights_reference(query.double(), wide(part), 2, shape.dim**-0.5)
        assert ((got - expected).abs() <= 1e-5).all()
        for begin, end in pairwise(part.offsets.tolist()):
            assert begin == end or abs(got[begin:end].double().sum() - 1) < 1e-5


def oracle(weights: Tensor, settings: Coarse, most: int) -> list[int]:
    """What the policy picks of these rows, with a cap of ``most``."""
    policy = replace(settings, core=100).policy(PromptShape(0, most, 1), 1)
    return np.flatnonzero(policy.pick_core(weights.numpy())).tolist()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_nucleus_is_the_policys(kernels: Callable[[Shape], Kernels], data: st.DataObject) -> None:
    """Weights in 2^-12, whose sums are exact: ties, zeros, lists of one row and of none."""
    lists = data.draw(st.lists(st.lists(st.integers(0, 40), max_size=90), min_size=1, max_size=3), "weights")
    weights = [torch.tensor(each, dtype=torch.float32) / 4096 for each in lists]
    mass = data.draw(st.sampled_from((1.0, 25.0, 50.0, 62.5, 95.0, 99.9, 100.0)), "mass")
    most = data.draw(st.integers(0, 60), "most")
    picked = kernels(SMALL).nucleus(weights, [(round(mass / 100 * 2**30), most)] * len(lists))
    for own, got in zip(weights, picked, strict=True):
        if own.sum() > 0:
            assert got == oracle(own, Coarse(core=40, mass=mass), most)
        assert len(got) <= most


def test_the_nucleus_of_a_softmax(kernels: Callable[[Shape], Kernels]) -> None:
    random = torch.Generator().manual_seed(0)
    weights = [(torch.randn(n, generator=random) * 3).softmax(0) for n in (1, 2, 64, 300, 577)]
    for mass, most in ((95, 1000), (95, 100), (100, 7), (50, 40)):
        picked = kernels(SMALL).nucleus(weights, [(round(mass / 100 * 2**30), most)] * len(weights))
        assert picked == [oracle(own, Coarse(mass=mass), most) for own in weights]


def test_a_nucleus_of_what_is_no_weight_stays_in_its_room(kernels: Callable[[Shape], Kernels]) -> None:
    broken = torch.full((50,), math.nan)
    (picked,) = kernels(SMALL).nucleus([broken], [(2**29, 10)])
    assert len(picked) <= 10
    (picked,) = kernels(SMALL).nucleus([torch.full((50,), math.inf)], [(2**29, 10)])
    assert len(picked) <= 10
    (picked,) = kernels(SMALL).nucleus([torch.zeros(50)], [(2**30, 10)])
    assert picked == list(range(10)), "as many as may be, the lower places first"
