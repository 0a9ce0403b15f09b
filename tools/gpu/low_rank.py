"""Low-rank rows of several ranks beside exact ones in one softmax, keys smoothed or not: against float64.

The reference rebuilds the same records over the same bases and turns keys as complex numbers, so that what is compared
is the kernel's arithmetic and not the formats' rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from avl_edge.attention.cuda import Bases, KernelShape, Lists, Pool, Step, Workspace
from avl_edge.attention.kernels import Part
from avl_edge.config import KvShape
from avl_edge.kv.formats import decode_coefficients, encode_coefficients
from avl_edge.kv.layout import UNIT, Format
from avl_edge.model.network.rope import Rope
from tools.gpu.dut import DeviceUnderTest, require, row_type
from tools.gpu.numerics import border_counts
from tools.gpu.packed import KV_HEADS, compare

FORMATS = ("exact", "lowrank:40@33+int8", "lowrank:80", "lowrank:9@5")
"""Of which the second and the third have more directions than are taken at once."""
_CONTEXT, _RANK = 500, 80


@dataclass(frozen=True)
class Memory:
    """Rows of all :data:`FORMATS` in two arenas; what is no row that is read, is a NaN in any of them.

    ``parts`` are the listed rows in float64 on the CPU, for references, and so is ``scale`` ``[B, H_kv, d]``, by which
    queries are smoothed, in the rows' type; the others are on the device.
    """

    parts: list[Part]
    keys: Tensor
    values: Tensor
    rows: Tensor
    offsets: Tensor
    positions: Tensor
    bases: Tensor
    angles: Tensor
    smoothing: Tensor
    scale: Tensor

    @property
    def pool(self) -> Pool:
        """Exact rows, and the records behind them."""
        (_, heads, dim) = self.keys.shape
        return Pool(self.keys.data_ptr(), self.values.data_ptr(), heads, *(heads * dim, dim) * 2)

    @property
    def step_bases(self) -> Bases:
        """As a step is given them."""
        return Bases(self.bases.data_ptr(), _RANK, self.positions.data_ptr(), self.angles.data_ptr())


class Arenas:
    """Rows put one after the other into two arenas, keys and values, and read back in float64."""

    def __init__(self, shape: KernelShape, pages: int) -> None:
        self.kv_shape = KvShape(1, KV_HEADS, shape.head_dim, row_type(shape).itemsize)
        self.rows = torch.full((2, pages, KV_HEADS, shape.head_dim), torch.nan, dtype=row_type(shape))
        self._bytes = self.rows.view(torch.uint8).flatten(1)
        self._size = self.kv_shape.row_bytes // 2
        self._end = 0

    def put(self, records: Tensor) -> Tensor:
        """Records uint8 ``[2, n, bytes]``, each behind a unit that is no record; where they begin, in units."""
        _, count, size = records.shape
        step = size + UNIT
        self._bytes[:, self._end : self._end + count * step].view(2, count, step)[..., UNIT:] = records
        begins = self._end + UNIT + torch.arange(count) * step
        self._end += -(-count * step // self._size) * self._size
        return begins // UNIT

    def put_exact(self, rows: Tensor) -> Tensor:
        """Rows ``[2, n, H_kv, d]``; their ids."""
        first = self._end // self._size
        self.rows[:, first : first + rows.shape[1]] = rows
        self._end += rows.shape[1] * self._size
        return first + torch.arange(rows.shape[1])


def make_memory(dut: DeviceUnderTest, shape: KernelShape, counts: Sequence[Sequence[int]], seed: int) -> Memory:
    """``counts`` rows for each format and sequence, of a few that there are; a basis for each sequence."""
    device, dtype, batch, some = dut.accelerator.device, row_type(shape), len(counts[0]), 50
    random = torch.Generator().manual_seed(seed)
    arenas = Arenas(shape, batch * _RANK + 6 * some + 1)
    directions = torch.randn(2, batch * _RANK, KV_HEADS, shape.head_dim, generator=random).to(dtype)
    bases = arenas.put_exact(directions)[torch.randperm(batch * _RANK, generator=random)].view(batch, _RANK)
    rope = Rope(shape.head_dim, {"rope_type": "default", "rope_theta": 10000.0})
    angles = torch.cat(rope.angles(torch.arange(_CONTEXT), dtype), 1)[..., : shape.head_dim // 2].contiguous()
    positions = torch.randint(_CONTEXT, (sum(map(sum, counts)),), generator=random)
    smoothed = (torch.arange(batch) % 2 == 1)[:, None, None]
    rows = torch.randn(2, 1, KV_HEADS, shape.head_dim, generator=random).to(dtype)
    rows[1].sigmoid_()
    smoothing = torch.where(smoothed.flatten(), arenas.put_exact(rows), -1)
    center, scale = torch.where(smoothed, rows[0], 0), torch.where(smoothed, rows[1], 1)
    parts, ids = [], []
    for name, of_part in zip(FORMATS, counts, strict=True):
        chosen = torch.randint(some, (sum(of_part),), generator=random)
        offsets = torch.tensor([0, *accumulate(of_part)], dtype=torch.int32)
        if name == "exact":
            rows = torch.randn(2, some, KV_HEADS, shape.head_dim, generator=random).to(dtype)
            ids.append(arenas.put_exact(rows)[chosen])
            keys, values = rows[:, chosen].double()
        else:
            form, before = Format(name), sum(map(len, ids))
            own = [torch.randn(some, form.basis_rows, generator=random) / 8 for _ in range(2)]
            records = torch.stack([encode_coefficients(form, each, dtype) for each in own])
            ids.append(arenas.put(records)[chosen])
            read = torch.stack([decode_coefficients(form, each, dtype)[chosen, : form.read_rank] for each in records])
            owner = torch.repeat_interleave(torch.arange(batch), offsets.diff())
            of_rows = bases[owner, : form.read_rank]
            keys, values = torch.einsum("anr,anrhd->anhd", read.double(), arenas.rows[:, of_rows].double())
            keys = _turned(keys, angles[positions[before : before + len(chosen)]])
            keys = (keys - center[owner].double()) / scale[owner].double()
        parts.append(Part("exact", keys, values, torch.arange(len(chosen), dtype=torch.int32), offsets))
    offsets = torch.tensor([0, *accumulate(n for of_part in counts for n in of_part)])
    tables = (torch.cat(ids), offsets, positions, bases, smoothing)
    listed, offsets, positions, bases, smoothing = (each.int().to(device) for each in tables)
    keys, values = arenas.rows.to(device)
    return Memory(parts, keys, values, listed, offsets, positions, bases, angles.to(device), smoothing, scale)


def _turned(keys: Tensor, angles: Tensor) -> Tensor:
    """Keys ``[n, H_kv, d]`` in float64 after RoPE, by ``angles`` ``[n, 2, d / 2]``."""
    turns = torch.complex(*angles.double().unbind(1))[:, None]
    turned = torch.complex(*keys.chunk(2, -1)) * turns
    return torch.cat([turned.real, turned.imag], -1)


def check_shape(dut: DeviceUnderTest, shape: KernelShape, splits: int = 3) -> dict[str, float]:
    """Sequences with rows of each format, of one only, with none; borders of splits; the same numbers again."""
    borders = border_counts(shape, splits)
    empty, few = [0] * len(borders), [3] * len(borders)
    counts = [[*few, *empty, 0], [*borders, *few, 0], [*few, *borders, 0], [*empty, *few, 0]]
    memory, batch = make_memory(dut, shape, counts, seed=6), len(counts[0])
    query = torch.randn(batch, KV_HEADS * shape.group, shape.head_dim, generator=torch.Generator().manual_seed(7))
    query = query.to(row_type(shape))
    out, scores = _step(dut, shape, memory, query, splits)
    again, _ = _step(dut, shape, memory, query, splits)
    require(torch.equal(out, again), f"{shape}: low-rank rows give other numbers the second time")
    query *= memory.scale.repeat_interleave(shape.group, 1)
    worst, worst_score = compare(shape, query, memory.parts, out, scores, "low-rank")
    return {"low_rank_out_max": worst, "low_rank_scores_max": worst_score}


def _step(
    dut: DeviceUnderTest, shape: KernelShape, memory: Memory, query: Tensor, splits: int
) -> tuple[Tensor, Tensor]:
    """Out and scores, on the CPU."""
    device, (batch, heads, _), capacity = dut.accelerator.device, query.shape, memory.rows.numel()
    sizes = (shape, batch, heads, splits, capacity)
    space = Workspace.of(*sizes, scores=True, parts=len(FORMATS), low_rank=True)
    scratch = torch.full((space.bytes,), 255, dtype=torch.uint8, device=device)  # all ones are a NaN
    own, keys = query.to(device, copy=True), torch.zeros(batch, KV_HEADS, shape.head_dim).to(device, query.dtype)
    out, scores = torch.full_like(own, torch.nan), torch.full((capacity,), torch.nan, device=device)
    lists = Lists.of(memory.rows.data_ptr(), memory.offsets.data_ptr(), batch, capacity, FORMATS)
    pointers = (own.data_ptr(), keys.data_ptr(), 0, 0, lists, out.data_ptr(), scores.data_ptr())
    step = Step(*pointers, written=(), bases=memory.step_bases, smoothing=memory.smoothing.data_ptr())
    dut.kernels(shape).step(step, memory.pool, space, scratch.data_ptr(), dut.accelerator.stream())
    dut.accelerator.synchronize()
    return out.cpu(), scores.cpu()
