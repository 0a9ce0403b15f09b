"""Rows of every format in one softmax, new rows smoothed and packed, and the choice of rows within a step: against
float64.

References decode the same records, so that what is compared is the kernels' arithmetic and not the formats' rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from avl_edge.attention.cuda import FORMATS, KernelShape, Lists, Pool, Scan, Step, Workspace
from avl_edge.attention.kernels import Part, attend_parts_reference, coarse_weights_reference
from avl_edge.config import KvShape, PromptShape
from avl_edge.kv.formats import decode, encode
from avl_edge.kv.layout import UNIT, Format
from avl_edge.kv.methods import Coarse
from tools.gpu.dut import DeviceUnderTest, require, row_type
from tools.gpu.numerics import SCORES, border_counts

KV_HEADS = 2
_WHOLE = 2**30


@dataclass(frozen=True)
class Memory:
    """Two arenas in which rows of all formats lie, as in a pool: what is no row that is read, is a NaN in any of them.

    ``parts`` are on the CPU, for references, over the arenas' content there; ``rows`` and ``offsets`` int32 ``[P * B +
    1]`` are all lists on the device.
    """

    parts: list[Part]
    keys: Tensor
    values: Tensor
    rows: Tensor
    offsets: Tensor
    pool: Pool


def make_memory(dut: DeviceUnderTest, shape: KernelShape, counts: Sequence[Sequence[int]], seed: int) -> Memory:
    """``counts`` rows for each format and sequence, each of a row of its own or shared."""
    device, dtype = dut.accelerator.device, row_type(shape)
    generator = torch.Generator().manual_seed(seed)
    size, most = KV_HEADS * shape.head_dim * dtype.itemsize, max(max(map(sum, counts)), 1)
    both = torch.full((2, len(FORMATS) * most, size), 255, dtype=torch.uint8)  # values lie right behind keys
    ids = []
    for number, (name, of_part) in enumerate(zip(FORMATS, counts, strict=True)):
        rows = torch.randn(2, most, KV_HEADS, shape.head_dim, generator=generator).to(dtype)
        own = number * most + torch.arange(most)  # of the places of exact rows, of which each packed row takes one
        _put(both, own, name, rows)
        chosen = own[torch.randint(most, (sum(of_part),), generator=generator)]
        ids.append((chosen if name == "exact" else chosen * (size // UNIT)).int())
    starts = [torch.tensor([0, *accumulate(of_part)], dtype=torch.int32) for of_part in counts]
    rows_of = both.view(dtype).view(2, -1, KV_HEADS, shape.head_dim)
    parts = [
        Part(name, *arenas_of(name, rows_of), own, start) for name, own, start in zip(FORMATS, ids, starts, strict=True)
    ]
    on_device = rows_of.to(device)
    offsets = torch.tensor([0, *accumulate(n for of_part in counts for n in of_part)], dtype=torch.int32)
    strides = KV_HEADS * shape.head_dim, shape.head_dim
    pool = Pool(on_device[0].data_ptr(), on_device[1].data_ptr(), KV_HEADS, *strides, *strides)
    return Memory(parts, on_device[0], on_device[1], torch.cat(ids).to(device), offsets.to(device), pool)


def _put(both: Tensor, places: Tensor, name: str, rows: Tensor) -> None:
    """Write keys and values ``[2, n, H_kv, d]`` into places of exact rows, of which ``both`` has ``[2, R, bytes]``."""
    form = Format(name)
    if form.is_exact:
        both[:, places] = rows.flatten(2).view(torch.uint8)
        return
    keys, values = encode(form.keys, rows[0]), encode(form.values, rows[1])
    if form.is_mixed:
        keys = torch.cat([keys, values], 1)
    else:
        both[1, places, : values.shape[1]] = values
    both[0, places, : keys.shape[1]] = keys


def arenas_of(name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as rows of a format lie in a pool ``[2, R, H_kv, d]``."""
    form, memory = Format(name), rows.view(torch.uint8).flatten()
    if form.is_exact:
        return rows[0], rows[1]
    if form.is_mixed:
        return memory, memory[form.keys.record_bytes(KvShape(1, rows.shape[2], rows.shape[3], rows.itemsize)) :]
    return memory[: len(memory) // 2], memory[len(memory) // 2 :]


def wide(part: Part) -> Part:
    """For a query in float64."""
    keys, values = (part.keys.double(), part.values.double()) if part.format == "exact" else (part.keys, part.values)
    return Part(part.format, keys, values, part.rows, part.offsets)


def check_mixture(dut: DeviceUnderTest, shape: KernelShape, splits: int = 3) -> dict[str, float]:
    """One softmax over rows of all formats: sequences with some of each, of one only, with none; borders of
    splits."""
    borders = border_counts(shape, splits)
    empty, few = [0] * len(borders), [3] * len(borders)
    turns = [few, borders, empty, few]
    counts = [[*turns[at], *turns[at - 1], *turns[at - 2], *turns[at - 3], 0] for at in range(len(FORMATS))]
    memory, batch, heads = make_memory(dut, shape, counts, seed=1), len(counts[0]), KV_HEADS * shape.group
    device, capacity, kernels = dut.accelerator.device, memory.rows.numel(), dut.kernels(shape)
    query = torch.randn(batch, heads, shape.head_dim, generator=torch.Generator().manual_seed(2)).to(row_type(shape))
    space = Workspace.of(shape, batch, heads, splits, capacity, scores=True, parts=len(FORMATS))
    scratch = torch.full((space.bytes,), 255, dtype=torch.uint8, device=device)
    own = query.to(device)
    out, scores = torch.full_like(own, torch.nan), torch.full((capacity,), torch.nan, device=device)
    lists = Lists.of(memory.rows.data_ptr(), memory.offsets.data_ptr(), batch, capacity, tuple(FORMATS))
    step = Step(own.data_ptr(), 0, 0, 0, lists, out.data_ptr(), scores.data_ptr(), written=())
    kernels.step(step, memory.pool, space, scratch.data_ptr(), dut.accelerator.stream())
    dut.accelerator.synchronize()
    parts = [wide(part) for part in memory.parts]
    worst, worst_score = compare(shape, query, parts, out.cpu(), scores.cpu(), "mixed")
    return {"mixed_out_max": worst, "mixed_scores_max": worst_score}


def compare(
    shape: KernelShape, query: Tensor, parts: Sequence[Part], out: Tensor, scores: Tensor, what: str
) -> tuple[float, float]:
    """The largest errors of ``out`` ``[B, H, d]`` and of ``scores`` ``[total]`` beside float64 over the same parts."""
    expected, weights = attend_parts_reference(query.double(), parts, KV_HEADS, shape.head_dim**-0.5, scores=True)
    assert weights is not None
    limits, error = torch.finfo(query.dtype), (out.double() - expected).abs()
    allowed = expected.abs() * limits.eps + limits.smallest_normal * limits.eps + 5e-5
    require(bool((error <= allowed).all()), f"{shape}: a {what} output is {float(error.max()):.2e} from float64")
    worst = float((scores.double() - torch.cat(weights)).abs().max())
    require(worst <= SCORES, f"{shape}: a {what} score is {worst:.2e} from float64")
    return float(error.max()), worst


def check_packing(dut: DeviceUnderTest, shape: KernelShape) -> dict[str, float]:
    """New rows are packed as the pool packs them, bit for bit in their values; a negative slot drops its row, and
    nothing else is touched."""
    device, dtype, count = dut.accelerator.device, row_type(shape), 9
    new = torch.randn(2, count, KV_HEADS, shape.head_dim, generator=torch.Generator().manual_seed(3)).to(dtype)
    new[:, 2], new[0, 4, 0, 0] = 0, torch.finfo(dtype).max
    places = torch.tensor([8, -1, 0, 3, 7, -1, 4, 5, 6], dtype=torch.int32)
    on_device = new.to(device)
    for name in FORMATS.keys() - {"exact"}:
        form, kv_shape = Format(name), KvShape(1, KV_HEADS, shape.head_dim, dtype.itemsize)
        sizes = [each.record_bytes(kv_shape) for each in (form.keys, form.values)]
        step = (sum(sizes) if form.is_mixed else sizes[0]) + UNIT
        arenas = torch.full((1 if form.is_mixed else 2, 9 * step), 77, dtype=torch.uint8, device=device)
        slots = torch.where(places < 0, places, places * (step // UNIT)).int().to(device)
        pool = Pool(arenas[0].data_ptr(), arenas[-1].data_ptr(), KV_HEADS, 0, 0, 0, 0)
        pointers = (on_device[0].data_ptr(), on_device[1].data_ptr(), slots.data_ptr(), count)
        dut.kernels(shape).append(*pointers, pool, dut.accelerator.stream(), name)
        dut.accelerator.synchronize()
        records, kept = arenas.cpu().view(-1, 9, step), places >= 0
        begins = (0, sizes[0] if form.is_mixed else 0)
        for arena, own, rows, begin, size in zip(
            (records[0], records[-1]), (form.keys, form.values), new, begins, sizes, strict=True
        ):
            got, expected = arena[places[kept].long()][:, begin : begin + size], encode(own, rows[kept])
            same = torch.equal(*(decode(own, each, KV_HEADS, shape.head_dim) for each in (got, expected)))
            require(same, f"{shape}: rows are not packed in {name} as the pool packs them")
        unwritten = torch.ones(9, dtype=torch.bool)
        unwritten[places[kept].long()] = False
        clean = bool((records[:, :, step - UNIT :] == 77).all() and (records[:, unwritten] == 77).all())
        require(clean, f"{shape}: packing in {name} wrote outside of its records")
    return {}


def check_smoothing(dut: DeviceUnderTest, shape: KernelShape) -> dict[str, float]:
    """New keys and queries are smoothed in place as torch does it, bit for bit; a sequence without smoothing keeps its
    own."""
    device, dtype, stream = dut.accelerator.device, row_type(shape), dut.accelerator.stream()
    row, generator = (KV_HEADS, shape.head_dim), torch.Generator().manual_seed(8)
    center, scale, key = (torch.randn(4, *row, generator=generator) for _ in range(3))
    query = torch.randn(4, KV_HEADS * shape.group, shape.head_dim, generator=generator)
    host = [each.to(dtype) for each in (query, key, center, scale.sigmoid())]
    ids = torch.tensor([2, -1, 0, 2], dtype=torch.int32)
    own, (of_query, of_key, centers, scales) = ids.to(device), [each.to(device, copy=True) for each in host]
    pool = Pool(centers.data_ptr(), scales.data_ptr(), KV_HEADS, *(KV_HEADS * shape.head_dim, shape.head_dim) * 2)
    dut.kernels(shape).smooth(of_query.data_ptr(), of_key.data_ptr(), own.data_ptr(), len(ids), pool, stream)
    dut.accelerator.synchronize()
    query, key, center, scale = host
    kept = ids < 0
    center, scale = center[ids].masked_fill(kept[:, None, None], 0), scale[ids].masked_fill(kept[:, None, None], 1)
    for what, got, expected in (
        ("key", of_key, (key - center) / scale),
        ("query", of_query, query * scale.repeat_interleave(shape.group, 1)),
    ):
        require(torch.equal(got.cpu(), expected), f"{shape}: a {what} is not smoothed as torch does it")
    return {}


def check_choice(dut: DeviceUnderTest, shape: KernelShape) -> dict[str, float]:
    """The weights of a scan of keys of every format against float64, and the rows that are chosen by them against the
    policy's own choice; each sequence scans one format."""
    sizes = [1, 40, 333, 0, 2, 97]
    counts = [[n if b % len(FORMATS) == part else 0 for b, n in enumerate(sizes)] for part in range(len(FORMATS))]
    memory, batch, heads = make_memory(dut, shape, counts, seed=4), len(sizes), KV_HEADS * shape.group
    device, scanned, room = dut.accelerator.device, memory.rows.numel(), 20
    query = 2 * torch.randn(batch, heads, shape.head_dim, generator=torch.Generator().manual_seed(5))
    query = query.to(row_type(shape))
    segments, own = len(FORMATS) * batch, query.to(device)
    listed = torch.arange(segments, dtype=torch.int32, device=device) * room
    ends, rows = torch.full_like(listed, -1), torch.full((segments * room,), -1, dtype=torch.int32, device=device)
    limits = torch.tensor([[_WHOLE * 9 // 10, room], [_WHOLE, 7]] * (batch // 2), dtype=torch.int32, device=device)
    picked = torch.full((scanned,), -1, dtype=torch.int8, device=device)
    logits, weights = (torch.full(size, torch.nan, device=device) for size in ((heads, scanned), (scanned,)))
    log_sums = torch.full((batch, heads), torch.nan, device=device)
    candidates = Lists.of(memory.rows.data_ptr(), memory.offsets.data_ptr(), batch, scanned, tuple(FORMATS))
    attended = Lists(rows.data_ptr(), listed.data_ptr(), ends.data_ptr(), batch, len(rows), tuple(FORMATS))
    scan = Scan(candidates, tuple(FORMATS), limits.data_ptr(), listed.data_ptr(), picked.data_ptr())
    kernels, stream = dut.kernels(shape), dut.accelerator.stream()
    for part in range(len(FORMATS)):
        kernels.scan(own.data_ptr(), memory.pool, candidates, part, logits.data_ptr(), stream)
    kernels.log_sums(logits.data_ptr(), candidates, heads, log_sums.data_ptr(), stream)
    kernels.scores(logits.data_ptr(), log_sums.data_ptr(), candidates, heads, weights.data_ptr(), stream)
    kernels.nucleus(weights.data_ptr(), scan, attended, stream)
    dut.accelerator.synchronize()
    scans = [
        coarse_weights_reference(query.double(), wide(part), KV_HEADS, shape.head_dim**-0.5) for part in memory.parts
    ]
    worst = float((weights.cpu().double() - torch.cat(scans)).abs().max())
    require(worst <= SCORES, f"{shape}: the weight of a scan is {worst:.2e} from float64")
    for segment, (begin, end) in enumerate(pairwise(memory.offsets.tolist())):
        share, most = limits[segment % batch].tolist()
        expected = _nucleus(weights[begin:end].cpu(), share / _WHOLE, most)
        first, last = segment * room, int(ends[segment])
        chosen = picked[begin:end].cpu().nonzero()[:, 0].tolist()
        require(chosen == expected, f"{shape}: other rows were chosen than by the policy")
        same = torch.equal(
            rows[first:last], memory.rows[begin:end][torch.tensor(chosen, dtype=torch.long, device=device)]
        )
        require(same, f"{shape}: the list of chosen rows is not of those")
    return {"scan_max": worst}


def _nucleus(weights: Tensor, share: float, most: int) -> list[int]:
    """What the policy picks, with a cap of ``most``."""
    if not len(weights):
        return []
    core = min(100.0, 100 * (most + 0.5) / len(weights))  # percent, of which a policy rounds down
    policy = Coarse(core=core, mass=100 * share).policy(PromptShape(0, len(weights), 1), 1)
    return [int(dut) for dut in np.flatnonzero(policy.pick_core(weights.numpy()))]


CHECKS = (check_mixture, check_packing, check_smoothing, check_choice)


def check_shape(dut: DeviceUnderTest, shape: KernelShape) -> dict[str, float]:
    """All checks of one shape; the largest errors."""
    found: dict[str, float] = {}
    for check in CHECKS:
        found |= check(dut, shape)
    return found
