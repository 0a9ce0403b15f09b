"""Every kernel of exact rows against float64 on the same rounded inputs; what a kernel fails to write stays NaN and
shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product

import torch
from torch import Tensor

from avl_edge.attention.cuda import KernelShape, Lists, Pool, PromptHeads, Step, Workspace
from tools.gpu.dut import DeviceUnderTest, require, row_type

HEAD_SIZES, ROWS = (64, 80, 96, 128, 256), ("Half", "Bfloat")
GROUPS = (1, 4, 7)
SCORES = 2e-5
"""Scores are float32: sums of hundreds of approximate exponentials."""


def shapes() -> Iterator[KernelShape]:
    """Every head size in both row types, alone and with grouped heads."""
    for dim, row, group in product(HEAD_SIZES, ROWS, GROUPS):
        yield KernelShape(dim, group, row)


@dataclass(frozen=True)
class Case:
    """Query row ``[B, H, d]``; pool row ``[R, H_kv, d]``; ``rows`` int32 ``[total]``, ``offsets`` int32 ``[B + 1]``."""

    query: Tensor
    keys: Tensor
    values: Tensor
    rows: Tensor
    offsets: Tensor


def border_counts(shape: KernelShape, splits: int) -> list[int]:
    """Selections of no row and one, and around the borders of tiles, of a block's turn and of splits."""
    tile, turn = shape.tile, shape.tile * shape.warps
    edges = (tile, turn, turn * splits, turn * splits * 2)
    return [0, 1, *(edge + step for edge in edges for step in (-1, 0, 1)), 0]


def make_case(
    dut: DeviceUnderTest, shape: KernelShape, counts: Sequence[int], pool: int, kv_heads: int, seed: int
) -> Case:
    """Random selections, ids given twice among them; rows that nobody selects hold NaN. A count of ``pool`` selects
    every row once, in random order."""
    device, dtype = dut.accelerator.device, row_type(shape)
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(pool, kv_heads, shape.head_dim, generator=generator) for _ in range(2))
    query = 2 * torch.randn(len(counts), kv_heads * shape.group, shape.head_dim, generator=generator)
    lists = [
        torch.randperm(pool, generator=generator) if n == pool else torch.randint(pool, (n,), generator=generator)
        for n in counts
    ]
    rows = torch.cat(lists).int()
    unread = torch.ones(pool, dtype=torch.bool)
    unread[rows.long()] = False
    keys[unread] = values[unread] = math.nan
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    query, keys, values = (tensor.to(device, dtype) for tensor in (query, keys, values))
    return Case(query, keys, values, rows.to(device), offsets.to(device))


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """out ``[B, H, d]`` and scores ``[total]`` in float64."""
    batch, heads, dim = case.query.shape
    group = heads // case.keys.shape[1]
    out = torch.zeros(batch, heads, dim, dtype=torch.float64, device=case.query.device)
    scores = torch.zeros(case.rows.numel(), dtype=torch.float64, device=case.query.device)
    for b, (begin, end) in enumerate(pairwise(case.offsets.tolist())):
        if begin < end:
            ids = case.rows[begin:end].long()
            key, value = (pool[ids].double().repeat_interleave(group, 1) for pool in (case.keys, case.values))
            softmax = (torch.einsum("hd,rhd->hr", case.query[b].double(), key) / math.sqrt(dim)).softmax(-1)
            out[b], scores[begin:end] = torch.einsum("hr,rhd->hd", softmax, value), softmax.mean(0)
    return out, scores


def run_step(dut: DeviceUnderTest, shape: KernelShape, case: Case, splits: int) -> tuple[Tensor, Tensor]:
    """One step through the kernels without new rows: out, and the scores of all listed rows."""
    device, (batch, heads, _) = case.query.device, case.query.shape
    capacity = case.rows.numel() + 3
    rows = torch.zeros(capacity, dtype=torch.int32, device=device)
    rows[: case.rows.numel()] = case.rows
    space = Workspace.of(shape, batch, heads, splits, capacity, scores=True)
    scratch = torch.full((space.bytes,), 255, dtype=torch.uint8, device=device)  # all ones are a NaN
    out, scores = torch.full_like(case.query, math.nan), torch.full((capacity,), math.nan, device=device)
    slots = torch.full((batch,), -1, dtype=torch.int32, device=device)
    unused = torch.zeros(batch, case.keys.shape[1], shape.head_dim, dtype=case.keys.dtype, device=device)
    lists = Lists.of(rows.data_ptr(), case.offsets.data_ptr(), batch, capacity)
    query, new = case.query.data_ptr(), unused.data_ptr()
    step = Step(query, new, new, slots.data_ptr(), lists, out.data_ptr(), scores.data_ptr())
    stream = dut.accelerator.stream()
    dut.kernels(shape).step(step, pool_of(case.keys, case.values), space, scratch.data_ptr(), stream)
    dut.accelerator.synchronize()
    require(bool(scores[case.rows.numel() :].isnan().all()), "scores were written past the last row")
    return out, scores[: case.rows.numel()]


def pool_of(keys: Tensor, values: Tensor) -> Pool:
    """The addresses and strides of a pool."""
    strides = (*keys.stride()[:2], *values.stride()[:2])
    return Pool(keys.data_ptr(), values.data_ptr(), keys.shape[1], *strides)


def check_step(dut: DeviceUnderTest, shape: KernelShape, splits: int = 3, kv_heads: int = 2) -> dict[str, float]:
    """Attention and scores: empty selections, one row, borders, every row, rows that several sequences share."""
    pool = 2 * shape.tile * shape.warps + 5
    case = make_case(dut, shape, [*border_counts(shape, splits), pool, pool], pool, kv_heads, seed=shape.head_dim)
    out, scores = run_step(dut, shape, case, splits)
    expected, expected_scores = reference(case)
    error = (out.double() - expected).abs()
    limits = torch.finfo(out.dtype)
    allowed = expected.abs() * limits.eps + limits.smallest_normal * limits.eps + 5e-5
    require(bool((error <= allowed).all()), f"{shape}: an output is {float(error.max()):.2e} from float64")
    relative = float(error.norm() / expected.norm())
    require(relative <= limits.eps, f"{shape}: outputs are {relative:.2e} from float64 as a whole")
    worst = float((scores.double() - expected_scores).abs().max())
    require(worst <= SCORES, f"{shape}: a score is {worst:.2e} from float64")
    return {"out_relative": relative, "out_max": float(error.max()), "scores_max": worst}


def check_alone(dut: DeviceUnderTest, shape: KernelShape) -> dict[str, float]:
    """A sequence's numbers are the same, bit for bit, in a batch, alone, and a second time."""
    counts = [shape.tile + 3, 5 * shape.tile * shape.warps + 1, 0, 7]
    case = make_case(dut, shape, counts, pool=200, kv_heads=2, seed=1)
    out, scores = run_step(dut, shape, case, splits=4)
    again, _ = run_step(dut, shape, case, splits=4)
    require(torch.equal(out, again), f"{shape}: the second run differs from the first")
    begin, end = case.offsets[1:3].tolist()
    ends = torch.tensor([0, end - begin], dtype=torch.int32, device=case.offsets.device)
    alone = Case(case.query[1:2].contiguous(), case.keys, case.values, case.rows[begin:end].contiguous(), ends)
    own, own_scores = run_step(dut, shape, alone, splits=4)
    same = torch.equal(out[1:2], own) and torch.equal(scores[begin:end], own_scores)
    require(same, f"{shape}: a sequence's numbers depend on its neighbours")
    return {}


def check_append(dut: DeviceUnderTest, shape: KernelShape) -> dict[str, float]:
    """New rows land in their slots, a negative slot drops its row, and nothing else is touched."""
    device, dtype, kv_heads, size = dut.accelerator.device, row_type(shape), 3, 40
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(size, kv_heads, shape.head_dim, generator=generator) for _ in range(2))
    new_keys, new_values = (torch.randn(9, kv_heads, shape.head_dim, generator=generator) for _ in range(2))
    keys, values, new_keys, new_values = (each.to(device, dtype) for each in (keys, values, new_keys, new_values))
    slots = torch.tensor([39, -1, 0, 3, 17, -1, 4, 5, 38], dtype=torch.int32, device=device)
    kept = slots >= 0
    expected = keys.clone(), values.clone()
    expected[0][slots[kept].long()], expected[1][slots[kept].long()] = new_keys[kept], new_values[kept]
    pointers = (new_keys.data_ptr(), new_values.data_ptr(), slots.data_ptr())
    dut.kernels(shape).append(*pointers, len(slots), pool_of(keys, values), dut.accelerator.stream())
    dut.accelerator.synchronize()
    same = torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
    require(same, f"{shape}: appended rows are not where they belong")
    return {}


def check_prompt(dut: DeviceUnderTest, shape: KernelShape, n: int = 333, piece: int = 5) -> dict[str, float]:
    """The scores of a prompt, its queries taken in pieces, against float64; no query sees what comes after it. Of all
    tokens, and of the last ones alone, as of a question over a shared prefix."""
    device, heads = dut.accelerator.device, 2 * shape.group
    generator = torch.Generator().manual_seed(2)
    query, keys = (torch.randn(n, count, shape.head_dim, generator=generator) for count in (heads, 2))
    query, keys = (each.to(device, row_type(shape)) for each in (query, keys))
    positions = torch.tensor([0, 5, 5, n // 2, n - 2, n - 2, n - 1, 17, n - 1], dtype=torch.int32, device=device)
    worst = 0.0
    for begin in (0, n // 3):
        asked = positions.clamp(min=begin)
        last, total = _prompt_scores(dut, shape, query[begin:].clone(), keys, asked, piece)
        wide = keys.double().repeat_interleave(shape.group, 1)
        logits = torch.einsum("qhd,nhd->qhn", query[asked.long()].double(), wide) / math.sqrt(shape.head_dim)
        hidden = torch.arange(n, device=device) > asked[:, None]
        received = logits.masked_fill(hidden[:, None], -math.inf).softmax(-1).mean(1)
        errors = last.double() - received[-1], total.double() - received[:-1].sum(0)
        worst = max(worst, *(float(error.abs().max()) for error in errors))
        require(worst <= 5 * SCORES, f"{shape}: a prompt's score is {worst:.2e} from float64")
    return {"prompt_scores_max": worst}


def _prompt_scores(
    dut: DeviceUnderTest, shape: KernelShape, query: Tensor, keys: Tensor, positions: Tensor, piece: int
) -> tuple[Tensor, Tensor]:
    """Last and total ``[n]`` through the kernels: query ``[w, H, d]`` of the last w tokens of keys ``[n, 2, d]``."""
    (w, heads, dim), n = query.shape, len(keys)
    last, total = torch.full((n,), math.nan, device=query.device), torch.zeros(n, device=query.device)
    kernels = dut.kernels(shape)
    scratch = torch.full((kernels.prompt_workspace(n, heads, piece),), 255, dtype=torch.uint8, device=query.device)
    of_query = PromptHeads(query.data_ptr() - (n - w) * heads * dim * query.itemsize, heads * dim, dim)
    of_keys = PromptHeads(keys.data_ptr(), 2 * dim, dim)
    sizes = (2, positions.data_ptr(), n, len(positions), last.data_ptr(), total.data_ptr(), scratch.data_ptr(), piece)
    kernels.score_prompt(of_query, of_keys, *sizes, dut.accelerator.stream())
    dut.accelerator.synchronize()
    return last, total


KERNEL_CHECKS = (check_step, check_alone, check_append, check_prompt)


def check_shape(dut: DeviceUnderTest, shape: KernelShape) -> dict[str, float]:
    """All checks of one shape; the largest errors."""
    found: dict[str, float] = {}
    for check in KERNEL_CHECKS:
        found |= check(dut, shape)
    return found
