"""The GPU backend without a GPU: a device that does everything at once, and kernels that run on the CPU.

`ReferenceModule` computes what the kernels promise, in torch, from the raw addresses that they are launched with, for
rows of any dtype; :mod:`tests.equipment.emulated_module` runs the CUDA source itself.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from avl_edge.attention.cuda import LOW_RANK, Kernels, KernelShape, Module
from avl_edge.attention.cuda.driver import Argument, Grid
from avl_edge.backends.cuda import CudaBackend, load_model
from avl_edge.config import KvShape
from avl_edge.kv.formats import decode, decode_coarse, decode_coefficients, encode
from avl_edge.kv.layout import UNIT, Format
from avl_edge.kv.store import RowStore
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec

_SIZES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.int32: 4, torch.uint8: 1, torch.int8: 1}


class HostDevice:
    """The CPU as an accelerator. A recorded step is the step itself, over the same memory; `log` says what happened,
    `launched` which of :func:`backend_for`'s reference kernels ran."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.log: list[str] = []
        self.launched: list[str] = []

    def stream(self) -> int:
        return 7

    def host_memory(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Filled with what nobody wrote, as memory is."""
        return torch.full(size, math.nan if dtype.is_floating_point else torch.iinfo(dtype).max // 2, dtype=dtype)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.log.append("record")
        step()

        def replay() -> None:
            self.log.append("replay")
            step()

        return replay

    def synchronize(self) -> None:
        self.log.append("synchronize")


def at(pointer: Argument, dtype: torch.dtype, *shape: int, strides: tuple[int, ...] | None = None) -> Tensor:
    """The memory behind a pointer as a tensor; nothing for a shape without elements."""
    if strides is None:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    assert pointer.value, "a null pointer was read"
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (elements * _SIZES[dtype])).from_address(pointer.value)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


class ReferenceModule:
    """Kernels by name, as plain functions of the memory that they are pointed to, for rows of one format, or of all
    low-rank ones. The whole selection is a part's split 0."""

    def __init__(self, shape: KernelShape, dtype: torch.dtype, format_: str = "exact") -> None:
        self._dim, self._group, self._dtype, self._format = shape.head_dim, shape.group, dtype, Format(format_)
        self.launched: list[str] = []

    def packed(self, reader: str) -> ReferenceModule:
        """That of another reader, which notes its launches in the same list."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, _format=Format(reader))
        return other

    def launch(self, kernel: str, grid: Grid, threads: int, stream: int, arguments: Sequence[Argument]) -> None:
        assert threads == 128
        assert stream == 7, "launched on another stream than the work before and after it"
        assert min(grid) >= 1, "CUDA refuses an empty grid"
        named = self._format.name in ("exact", LOW_RANK)  # well enough by the kernel
        self.launched.append(kernel if named else f"{kernel} {self._format.name}")
        getattr(self, kernel)(grid, *arguments)

    def _pool(self, pointer: Argument, rows: Tensor, kv_heads: int, row: Argument, head: Argument) -> Tensor:
        """The pool up to the last row that is named."""
        size = int(rows.max()) + 1 if rows.numel() else 0
        strides = (int(row.value or 0), int(head.value or 0), 1)
        return at(pointer, self._dtype, size, kv_heads, self._dim, strides=strides)

    def _records(self, pointer: Argument, form: Format, rows: Tensor, kv_heads: int) -> Tensor:
        """A record of the arena at every unit up to the last row that is named."""
        size = form.record_bytes(KvShape(1, kv_heads, self._dim, 2))
        return at(pointer, torch.uint8, int(rows.max()) + 1 if rows.numel() else 0, size, strides=(UNIT, 1))

    def _read(
        self,
        pointer: Argument,
        form: Format,
        rows: Tensor,
        kv_heads: int,
        strides: Sequence[Argument],
        *,
        coarse: bool = False,
    ) -> Tensor:
        """Rows [n, H, d] in float64, a key/value head for each query head."""
        ids = rows.long()
        if form.is_exact:
            read = self._pool(pointer, rows, kv_heads, *strides)[ids]
        elif coarse and form.name == "int8":
            read = decode_coarse(self._records(pointer, form, rows, kv_heads)[ids], kv_heads, self._dim)
        else:
            read = decode(form, self._records(pointer, form, rows, kv_heads)[ids], kv_heads, self._dim)
        return read.double().repeat_interleave(self._group, 1)

    def avl_smooth(self, grid: Grid, *a: Argument) -> None:
        query, new_keys, smoothing, *strides, keys, values = a
        kv_heads, batch, _ = grid
        ids = at(smoothing, torch.int32, batch)
        own = torch.nonzero(ids >= 0)[:, 0]
        center, scale = self._smoothing(keys, values, ids[own], kv_heads, strides)
        for_keys = at(new_keys, self._dtype, batch, kv_heads, self._dim)
        for_keys[own] = (for_keys[own] - center) / scale
        asked = at(query, self._dtype, batch, kv_heads * self._group, self._dim)
        asked[own] *= scale.repeat_interleave(self._group, 1)

    def _smoothing(
        self, keys: Argument, values: Argument, ids: Tensor, kv_heads: int, strides: Sequence[Argument]
    ) -> tuple[Tensor, Tensor]:
        """Centers and scales ``[n, H_kv, d]``."""
        pools = ((keys, strides[:2]), (values, strides[2:]))
        center, scale = (self._pool(pool, ids, kv_heads, *stride)[ids.long()] for pool, stride in pools)
        return center, scale

    def avl_append(self, grid: Grid, *a: Argument) -> None:
        new_keys, new_values, slots, kv_heads, *strides, keys, values = a
        ids, heads = at(slots, torch.int32, grid[0]), int(kv_heads.value or 0)
        assert grid[1] == 2
        kept = torch.nonzero(ids >= 0)[:, 0]
        assert len(set(ids[kept].tolist())) == len(kept), "two new rows go into one slot"
        sides = (
            (new_keys, keys, self._format.keys, strides[:2]),
            (new_values, values, self._format.values, strides[2:]),
        )
        for new, pool, form, stride in sides:
            rows = at(new, self._dtype, grid[0], heads, self._dim)[kept]
            if self._format.is_exact:
                self._pool(pool, ids[kept], heads, *stride)[ids[kept].long()] = rows
            else:
                self._records(pool, form, ids[kept], heads)[ids[kept].long()] = encode(form, rows)

    def avl_attend(self, grid: Grid, *a: Argument) -> None:
        query, keys, values, rows, begins, ends, *strides, capacity, first, all_splits, sums, states, logits = a
        pools = ((keys, self._format.keys, strides[:2]), (values, self._format.values, strides[2:]))

        def read(_: int, begin: int, end: int) -> list[Tensor]:
            ids = at(rows, torch.int32, end)[begin:]
            return [self._read(pool, form, ids, grid[0], stride) for pool, form, stride in pools]

        self._attend(grid, read, query, begins, ends, capacity, first, all_splits, sums, states, logits)

    def avl_attend_low_rank(self, grid: Grid, *a: Argument) -> None:
        query, keys, values, rows, begins, ends, positions, bases, angles, smoothing, *numbers, sums, states, logits = a
        *strides, capacity, first, all_splits, most, n_rank, packed = numbers
        rank, half = int(n_rank.value or 0), self._dim // 2
        assert logits.value, "low-rank rows need logits in any case"

        def read(b: int, begin: int, end: int) -> list[Tensor]:
            ids, of_tokens = (at(table, torch.int32, end)[begin:].long() for table in (rows, positions))
            basis = at(bases, torch.int32, grid[2], int(most.value or 0))[b, :rank]
            form = Format(f"lowrank:{rank}" + "+int8" * int(packed.value or 0))
            dense = []
            for pool, stride in ((keys, strides[:2]), (values, strides[2:])):
                size = form.record_bytes(KvShape(1, grid[0], self._dim, self._dtype.itemsize))
                records = at(pool, torch.uint8, int(ids.max()) + 1, size, strides=(UNIT, 1))[ids]
                found = decode_coefficients(form, records, self._dtype).double()
                directions = self._pool(pool, basis, grid[0], *stride)[basis.long()].double()
                dense.append(torch.einsum("nr,rhd->nhd", found, directions).repeat_interleave(self._group, 1))
            turns = at(angles, self._dtype, int(of_tokens.max()) + 1, 2, 1, half)[of_tokens].double()
            rotated = torch.complex(*dense[0].split(half, -1)) * torch.complex(*turns.unbind(1))
            turned = torch.cat([rotated.real, rotated.imag], -1)
            own = at(smoothing, torch.int32, grid[2])[b : b + 1] if smoothing.value else torch.tensor([-1])
            if own[0] >= 0:
                both = self._smoothing(keys, values, own, grid[0], strides)
                center, scale = (each.double().repeat_interleave(self._group, 1) for each in both)
                turned = (turned - center) / scale
            return [turned, dense[1]]

        self._attend(grid, read, query, begins, ends, capacity, first, all_splits, sums, states, logits)

    def _attend(self, grid: Grid, read: Callable[[int, int, int], list[Tensor]], *a: Argument) -> None:
        """A part's results; ``read`` gives keys and values ``[n, H, d]`` of those from one entry to another that a
        sequence lists."""
        query, begins, ends, capacity, first, all_splits, sums, states, logits = a
        (kv_heads, splits, batch), room = grid, int(capacity.value or 0)
        heads, place, total = kv_heads * self._group, int(first.value or 0), int(all_splits.value or 0)
        assert place % splits == total % splits == 0
        for b, (begin, end) in enumerate(_bounds(begins, ends, batch)):
            assert 0 <= begin <= end <= room
            if begin == end:
                continue
            keys, values = read(b, begin, end)
            own = at(query, self._dtype, batch, heads, self._dim)[b].double()
            products = torch.einsum("hd,rhd->hr", own, keys) / math.sqrt(self._dim) * math.log2(math.e)
            peak = products.amax(1)
            weights = torch.exp2(products - peak[:, None])
            at(sums, torch.float32, batch, total, heads, self._dim)[b, place] = torch.einsum(
                "hr,rhd->hd", weights, values
            ).float()
            at(states, torch.float32, batch, total, heads, 2)[b, place] = torch.stack([peak, weights.sum(1)], 1).float()
            if logits.value:
                at(logits, torch.float32, heads, room)[:, begin:end] = products.float()

    def avl_scan(self, grid: Grid, *a: Argument) -> None:
        query, keys, rows, begins, ends, *strides, capacity, logits = a
        (kv_heads, _, batch), room = grid, int(capacity.value or 0)
        for b, (begin, end) in enumerate(_bounds(begins, ends, batch)):
            ids = at(rows, torch.int32, room)[begin:end]
            wide = self._read(keys, self._format.keys, ids, kv_heads, strides, coarse=True)
            own = at(query, self._dtype, batch, kv_heads * self._group, self._dim)[b].double()
            products = torch.einsum("hd,rhd->hr", own, wide) / math.sqrt(self._dim) * math.log2(math.e)
            at(logits, torch.float32, len(own), room)[:, begin:end] = products.float()

    def avl_log_sums(self, grid: Grid, *a: Argument) -> None:
        logits, begins, ends, n_heads, capacity, log_sums = a
        (_, batch, parts), heads, room = grid, int(n_heads.value or 0), int(capacity.value or 0)
        for segment, (begin, end) in enumerate(_bounds(begins, ends, parts * batch)):
            if begin < end:
                natural = at(logits, torch.float32, heads, room)[:, begin:end].double() * math.log(2)
                at(log_sums, torch.float32, batch, heads)[segment % batch] = natural.logsumexp(1) / math.log(2)

    def avl_nucleus(self, grid: Grid, *a: Argument) -> None:
        weights, candidates, begins, ends, limits, listed, rows, attended, picked = a
        batch, parts, _ = grid
        bounds = _bounds(begins, ends, parts * batch)
        room = max(end for _, end in bounds)
        for segment, (begin, end) in enumerate(bounds):
            share, most = at(limits, torch.int32, batch, 2)[segment % batch].tolist()
            own = at(weights, torch.float32, room)[begin:end].double()
            order = own.argsort(descending=True, stable=True)
            held = own[order].cumsum(0)
            enough = int((held < share / 2**30 * held[-1]).sum()) + 1 if share < 2**30 and len(own) else len(own)
            chosen = order[: min(enough, most)].sort().values
            first = int(at(listed, torch.int32, parts * batch)[segment])
            at(attended, torch.int32, parts * batch)[segment] = first + len(chosen)
            at(rows, torch.int32, first + len(chosen))[first:] = at(candidates, torch.int32, room)[begin:end][chosen]
            flags = at(picked, torch.int8, room)[begin:end]
            flags[:] = 0
            flags[chosen] = 1

    def avl_merge(self, grid: Grid, *a: Argument) -> None:
        sums, states, begins, ends, n_heads, n_splits, n_parts, out, log_sums = a
        batch, heads, splits, parts = grid[1], *(int(each.value or 0) for each in (n_heads, n_splits, n_parts))
        assert grid[0] == -(-heads // 4)
        there = torch.tensor([end > begin for begin, end in _bounds(begins, ends, parts * batch)]).view(parts, batch)
        peaks, masses = at(states, torch.float32, batch, parts * splits, heads, 2)[:, ::splits].unbind(-1)
        wide = at(sums, torch.float32, batch, parts * splits, heads, self._dim)[:, ::splits]
        for b in range(batch):
            own = there[:, b]
            if not own.any():
                at(out, self._dtype, batch, heads, self._dim)[b] = 0
                at(log_sums, torch.float32, batch, heads)[b] = -3e38
                continue
            peak = peaks[b, own].amax(0)
            shares = torch.exp2(peaks[b, own] - peak)
            mass = (shares * masses[b, own]).sum(0)
            result = (shares[..., None] * wide[b, own]).sum(0) / mass[:, None]
            at(out, self._dtype, batch, heads, self._dim)[b] = result.to(self._dtype)
            at(log_sums, torch.float32, batch, heads)[b] = peak + mass.log2()

    def avl_scores(self, grid: Grid, *a: Argument) -> None:
        logits, log_sums, begins, ends, n_heads, capacity, scores = a
        (_, batch, parts), heads, room = grid, int(n_heads.value or 0), int(capacity.value or 0)
        for segment, (begin, end) in enumerate(_bounds(begins, ends, parts * batch)):
            if begin < end:
                own = at(logits, torch.float32, heads, room)[:, begin:end]
                weights = torch.exp2(own - at(log_sums, torch.float32, batch, heads)[segment % batch, :, None])
                at(scores, torch.float32, room)[begin:end] = weights.mean(0)

    def avl_prompt_logits(self, grid: Grid, *a: Argument) -> None:
        query, keys, positions, *sizes, logits = a
        n, queries, query_token, query_head, key_token, key_head = (int(size.value or 0) for size in sizes)
        heads = grid[0] * self._group
        ids = at(positions, torch.int32, queries).long()
        assert 0 <= int(ids.min()) <= int(ids.max()) < n
        all_queries = at(query, self._dtype, n, heads, self._dim, strides=(query_token, query_head, 1))
        all_keys = at(keys, self._dtype, n, grid[0], self._dim, strides=(key_token, key_head, 1))
        wide = all_keys.double().repeat_interleave(self._group, 1)
        products = torch.einsum("qhd,nhd->qhn", all_queries[ids].double(), wide)
        products *= math.log2(math.e) / math.sqrt(self._dim)
        products[(torch.arange(n) > ids[:, None])[:, None].expand_as(products)] = -3e38
        at(logits, torch.float32, queries, heads, n)[:] = products.float()

    def avl_prompt_log_sums(self, grid: Grid, *a: Argument) -> None:
        logits, n, softmaxes, log_sums = a
        size, count = int(n.value or 0), int(softmaxes.value or 0)
        assert grid == (-(-count // 4), 1, 1)
        natural = at(logits, torch.float32, count, size).double() * math.log(2)
        at(log_sums, torch.float32, count)[:] = (natural.logsumexp(1) / math.log(2)).float()

    def avl_prompt_scores(self, grid: Grid, *a: Argument) -> None:
        logits, log_sums, *sizes, last, total = a
        n, heads, queries, summed = (int(size.value or 0) for size in sizes)
        assert grid == (-(-n // 32), 1, 1)
        sums = at(log_sums, torch.float32, queries, heads, 1)
        received = torch.exp2(at(logits, torch.float32, queries, heads, n) - sums).mean(1)
        at(total, torch.float32, n)[:] += received[:summed].sum(0)
        at(last, torch.float32, n)[:] = received[-1]


def _bounds(begins: Argument, ends: Argument, count: int) -> list[tuple[int, int]]:
    return list(zip(at(begins, torch.int32, count).tolist(), at(ends, torch.int32, count).tolist(), strict=True))


def reference_kernels(head_dim: int, group: int, dtype: torch.dtype, launched: list[str] | None = None) -> Kernels:
    """Kernels that compute in torch; float32 rows too, which the source does not take. ``launched`` notes what ran."""
    shape = KernelShape(head_dim, group, "Bfloat" if dtype == torch.bfloat16 else "Half")
    module = ReferenceModule(shape, dtype)
    if launched is not None:
        module.launched = launched
    return Kernels(module, shape, packed=module.packed)


def backend_for(
    directory: Path, pages: int, module: Callable[[str], Module] | None = None, warps: int = 4
) -> tuple[CudaBackend, HostDevice]:
    """The GPU backend over a checkpoint, on the CPU, its kernels the reference or those of ``module``, by format."""
    spec = read_spec(directory)
    device = HostDevice()
    model = load_model(spec, load_weights(directory, prefixes=spec.prefixes), device.device)
    text = spec.text
    store = RowStore(pages, text.kv_shape(model.dtype.itemsize), model.dtype)
    group = text.heads // text.kv_heads
    kernels = reference_kernels(text.head_dim, group, model.dtype, device.launched)
    if module is not None:
        row = "Bfloat" if model.dtype == torch.bfloat16 else "Half"
        kernels = Kernels(module("exact"), KernelShape(text.head_dim, group, row, warps), 1, module)
    return CudaBackend(model, store, kernels, device), device
