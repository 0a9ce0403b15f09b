"""The CUDA kernels without a GPU: their source compiled as C++ for the CPU.

`plugins/emulation` runs the kernels with a context for each CUDA thread. They are compared with float64 arithmetic on
the same rounded inputs; outputs and workspace start as NaN, so that what a kernel fails to write shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.equipment.emulated_kernels import NAMES, SHAPES, Kernels, Shape
from tests.equipment.emulated_parts import compiled


@pytest.fixture(scope="module")
def kernels(shared_folder: Path) -> Callable[[Shape], Kernels]:
    """``kernels(shape)``: compiled once, for exact rows."""
    return compiled(dict.fromkeys(SHAPES, ("exact",)), shared_folder)


@dataclass
class Case:
    query: Tensor
    keys: Tensor
    values: Tensor
    rows: Tensor
    offsets: Tensor


def make_case(
    shape: Shape, counts: list[int], pool: int, kv_heads: int = 1, padding: int = 0, sharpness: float = 1, seed: int = 0
) -> Case:
    """Random selections, `counts` rows each, of a pool whose other rows hold NaN, as does the padding between rows."""
    generator = torch.Generator().manual_seed(seed)
    size = (pool, kv_heads, shape.dim + padding)
    keys, values = (torch.randn(size, generator=generator).to(shape.dtype) for _ in range(2))
    query = torch.randn(len(counts), kv_heads * shape.group, shape.dim, generator=generator) * sharpness
    rows = torch.randint(pool, (sum(counts),), generator=generator, dtype=torch.int32)
    for tensor in (keys, values):
        tensor[..., shape.dim :] = math.nan
        tensor[[row for row in range(pool) if row not in set(rows.tolist())]] = math.nan
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    return Case(query.to(shape.dtype), keys[..., : shape.dim], values[..., : shape.dim], rows, offsets)


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """out and scores in float64."""
    batch, heads, dim = case.query.shape
    group = heads // case.keys.shape[1]
    out, scores = (
        torch.zeros(batch, heads, dim, dtype=torch.float64),
        torch.zeros(case.rows.numel(), dtype=torch.float64),
    )
    for b, (begin, end) in enumerate(pairwise(case.offsets.tolist())):
        if begin < end:
            ids = case.rows[begin:end].long()
            key, value = (pool[ids].double().repeat_interleave(group, 1) for pool in (case.keys, case.values))
            logits = torch.einsum("hd,rhd->hr", case.query[b].double(), key) / math.sqrt(dim)
            softmax = logits.softmax(-1)
            out[b], scores[begin:end] = torch.einsum("hr,rhd->hd", softmax, value), softmax.mean(0)
    return out, scores


def check(case: Case, out: Tensor, scores: Tensor) -> None:
    """Within 2e-3 of float64 as a whole, and no element further off than its own rounding and float32's."""
    expected, expected_scores = reference(case)
    limits = torch.finfo(out.dtype)
    error = (out.double() - expected).abs()
    assert error.norm() <= 2e-3 * expected.norm()
    assert (error <= expected.abs() * limits.eps / 2 + limits.smallest_normal * limits.eps + 1e-5).all()
    assert ((scores.double() - expected_scores).abs() <= 1e-5).all()
    for begin, end in pairwise(case.offsets.tolist()):
        assert begin == end or abs(scores[begin:end].double().sum() - 1) < 1e-5


every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_shape
def test_counts_at_the_borders_of_tiles_and_splits(kernels: Callable[[Shape], Kernels], shape: Shape) -> None:
    tile, turn = shape.tile, shape.tile * shape.warps  # a turn: every warp of a block has a tile
    counts = [0, 1, tile - 1, tile, tile + 1, 2 * tile, 2 * tile + 1, 0, 2 * turn - 1, 2 * turn + 1, 8 * turn + 3]
    case = make_case(shape, counts, pool=50)
    out, scores = kernels(shape).attend(case.query, case.keys, case.values, case.rows, case.offsets, splits=2)
    assert scores is not None
    check(case, out, scores)
    assert not out[[0, 7]].any()
    assert torch.equal(out[1], case.values[case.rows[0].long()].repeat_interleave(shape.group, 0))
    assert scores[0] == 1


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_selection(kernels: Callable[[Shape], Kernels], data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES), "shape")
    case = make_case(
        shape,
        data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3), "counts"),
        pool=data.draw(st.integers(1, 60), "pool"),
        kv_heads=data.draw(st.integers(1, 2), "kv_heads"),
        padding=data.draw(st.sampled_from((0, 8)), "padding"),
        sharpness=data.draw(st.sampled_from((0.1, 1, 6)), "sharpness"),
        seed=data.draw(st.integers(0, 2**32), "seed"),
    )
    splits = data.draw(st.integers(1, 5), "splits")
    out, scores = kernels(shape).attend(case.query, case.keys, case.values, case.rows, case.offsets, splits)
    assert scores is not None
    check(case, out, scores)


def test_every_row_by_every_sequence(kernels: Callable[[Shape], Kernels]) -> None:
    shape, pool, batch = SHAPES[0], 40, 3
    case = make_case(shape, [1], pool)
    keys, values = (torch.randn(pool, 2, shape.dim).to(shape.dtype) for _ in range(2))
    rows = torch.arange(pool, dtype=torch.int32).repeat(batch)
    offsets = torch.arange(0, batch * pool + 1, pool, dtype=torch.int32)
    case = Case(torch.randn(1, 2, shape.dim).to(shape.dtype).repeat(batch, 1, 1), keys, values, rows, offsets)
    out, scores = kernels(shape).attend(case.query, keys, values, rows, offsets, splits=3)
    assert scores is not None
    check(case, out, scores)
    assert torch.equal(out[0], out[1])
    assert torch.equal(scores[:pool], scores[pool : 2 * pool])


def test_a_sequence_does_not_depend_on_others_on_scores_or_on_the_order_of_blocks(
    kernels: Callable[[Shape], Kernels],
) -> None:
    shape = SHAPES[2]
    case = make_case(shape, [30, 0, 45, 7], pool=60, kv_heads=2)
    run = kernels(shape).attend
    pool = (case.keys, case.values)
    out, scores = run(case.query, *pool, case.rows, case.offsets, splits=3)
    assert scores is not None
    backwards = run(case.query, *pool, case.rows, case.offsets, splits=3, backwards=True)
    assert torch.equal(out, backwards[0])
    assert torch.equal(scores, backwards[1])
    assert torch.equal(out, run(case.query, *pool, case.rows, case.offsets, splits=3, scores=False)[0])
    alone = run(case.query[2:3], *pool, case.rows[30:75], torch.tensor([0, 45], dtype=torch.int32), splits=3)
    assert torch.equal(out[2:3], alone[0])
    assert torch.equal(scores[30:75], alone[1])


def test_a_nan_in_a_selected_row_is_not_hidden(kernels: Callable[[Shape], Kernels]) -> None:
    shape = SHAPES[0]
    for spoiled in ("keys", "values"):
        case = make_case(shape, [20, 20], pool=50, kv_heads=2)
        getattr(case, spoiled)[case.rows[3], 1, 5] = math.nan
        case.rows[20:] = case.rows[0]  # the second sequence does not read the row
        out, _ = kernels(shape).attend(case.query, case.keys, case.values, case.rows, case.offsets, splits=2)
        assert out[0, 1].isnan().any()
        assert not out[0, 0].isnan().any()
        assert not out[1].isnan().any()


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_numbers_keep_their_value(kernels: Callable[[Shape], Kernels], dtype: torch.dtype) -> None:
    """One row has all the weight: out is its value, bit for bit, for the largest and the smallest numbers too."""
    shape = next(shape for shape in SHAPES if shape.dtype == dtype)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (8, 2, shape.dim), generator=generator, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = torch.where(values.isfinite(), values, torch.finfo(dtype).max)
    values[0, 0, 0], values[0, 0, 1] = torch.finfo(dtype).smallest_normal / 4, -torch.finfo(dtype).tiny
    query = torch.randn(8, 2 * shape.group, shape.dim).to(dtype)
    rows, offsets = torch.arange(8, dtype=torch.int32), torch.arange(9, dtype=torch.int32)
    out, _ = kernels(shape).attend(query, torch.randn(values.shape).to(dtype), values, rows, offsets, splits=1)
    assert torch.equal(out, values.repeat_interleave(shape.group, 1))


@every_shape
def test_append_writes_its_slots_and_nothing_else(kernels: Callable[[Shape], Kernels], shape: Shape) -> None:
    kv_heads, pool = 3, 9
    keys = torch.randn(pool, kv_heads, shape.dim + 8).to(shape.dtype)
    values = torch.randn(kv_heads, pool, shape.dim).to(shape.dtype).transpose(0, 1)
    new_keys, new_values = (torch.randn(4, kv_heads, shape.dim).to(shape.dtype) for _ in range(2))
    slots = torch.tensor([8, -1, 0, 3], dtype=torch.int32)
    expected = keys.clone(), values.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0][slot, :, : shape.dim], expected[1][slot] = new_keys[row], new_values[row]
    strides = (keys.stride(0), keys.stride(1), values.stride(0), values.stride(1))
    kernels(shape).launch("avl_append", (4, 2), new_keys, new_values, slots, kv_heads, *strides, keys, values)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


def prompt_reference(query: Tensor, keys: Tensor, positions: list[int]) -> list[Tensor]:
    """For each position the attention that all tokens receive from it, in float64, averaged over heads."""
    heads, n, dim = query.shape
    wide = keys.double().repeat_interleave(heads // keys.shape[0], 0)
    received = []
    for position in positions:
        logits = torch.einsum("hd,hnd->hn", query[:, position].double(), wide[:, : position + 1]) / math.sqrt(dim)
        received.append(torch.cat((logits.softmax(-1).mean(0), torch.zeros(n - position - 1, dtype=torch.float64))))
    return received


@every_shape
@pytest.mark.parametrize("token_major", [False, True], ids=["heads first", "tokens first"])
def test_prompt_scores(kernels: Callable[[Shape], Kernels], shape: Shape, token_major: bool) -> None:
    n, positions = 4 * shape.tile * shape.warps + 5, [3, 17, 17, 0]
    positions.append(n - 1)
    query, keys = (torch.randn(heads, n, shape.dim).to(shape.dtype) for heads in (shape.group, 1))
    if token_major:
        query, keys = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, keys))
    received = prompt_reference(query, keys, positions)
    total = torch.zeros(n)
    ids = torch.tensor(positions, dtype=torch.int32)
    last = kernels(shape).prompt_scores(query, keys, ids, len(positions) - 1, total)
    assert ((last - received[-1]).abs() <= 1e-5).all()
    assert ((total - sum(received[:-1])).abs() <= 1e-5).all()
    assert abs(last.double().sum() - 1) < 1e-5
    assert not total[18:].any(), "no query sees what comes after it"


@pytest.mark.parametrize("own", [1, 9])
def test_prompt_scores_of_the_last_tokens_alone(kernels: Callable[[Shape], Kernels], own: int) -> None:
    """Where the queries of those before them were never made: positions are those in the prompt all the same."""
    shape, n = SHAPES[1], 41
    query, keys = (torch.randn(n, heads, shape.dim).to(shape.dtype).transpose(0, 1) for heads in (2 * shape.group, 2))
    positions = torch.tensor([n - own, n - 1, n - (own + 1) // 2, n - 1], dtype=torch.int32)
    of_all, of_last = torch.zeros(2, n)
    run = kernels(shape).prompt_scores
    expected = run(query, keys, positions, 3, of_all)
    mine = query[:, n - own :].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(run(mine, keys, positions, 3, of_last), expected)
    assert torch.equal(of_last, of_all)
    received = prompt_reference(query, keys, positions.tolist())
    assert ((of_all - sum(received[:-1])).abs() <= 1e-5).all()
    assert ((expected - received[-1]).abs() <= 1e-5).all()


def test_prompt_scores_in_pieces(kernels: Callable[[Shape], Kernels]) -> None:
    shape, n = SHAPES[2], 37
    query, keys = (torch.randn(heads, n, shape.dim).to(shape.dtype) for heads in (2 * shape.group, 2))
    positions = torch.tensor([30, 31, 32, 36, 36], dtype=torch.int32)
    whole, pieces = torch.zeros(n), torch.zeros(n)
    run = kernels(shape).prompt_scores
    last = run(query, keys, positions, 4, whole)
    run(query, keys, positions[:2], 2, pieces)
    assert torch.equal(run(query, keys, positions[2:], 2, pieces), last)
    torch.testing.assert_close(pieces, whole)
    only = torch.zeros(n)
    assert torch.equal(run(query, keys, positions[-1:], 0, only), last)
    assert not only.any()
