"""How fast: selected rows against a plain copy and against torch's fused attention, and whole decode steps.

Attention is timed over the rows of several layers in turn, more bytes than caches hold, as a decode step reads them.
Every figure is a median of rounds, between events of the device's own clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from avl_edge.attention.cuda import Bases, KernelShape, Lists, Step, Workspace
from avl_edge.config import KvShape
from avl_edge.kv.layout import UNIT, Format
from tools.gpu.dut import DeviceUnderTest, row_type
from tools.gpu.numerics import pool_of

GB = 1e9
_CACHES = 512 * 2**20
"""Bytes: several times the largest second-level cache."""


@dataclass(frozen=True)
class Load:
    """One layer's attention in a decode step: ``batch`` sequences that hold ``rows`` each and read ``selected``.

    The default is LLaVA-1.6-7B's layer after a picture of 2,340 tokens, its rows exact.
    """

    batch: int
    selected: int
    rows: int = 2340
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    layers: int = 8
    format: str = "exact"

    @property
    def shape(self) -> KernelShape:
        return KernelShape(self.head_dim, self.heads // self.kv_heads, "Half")

    @property
    def bytes(self) -> int:
        """Keys and values of the selected rows of one layer, and the bases that they are read over."""
        kv_shape, form = KvShape(1, self.kv_heads, self.head_dim, 2), Format(self.format)
        return self.batch * (self.selected * form.read_bytes(kv_shape) + self.rank * kv_shape.row_bytes)

    @property
    def rank(self) -> int:
        """Directions of a basis that low-rank rows are read by; 0 for others."""
        return Format(self.format).basis_rows_read


def beyond_caches(load: Load) -> Load:
    """As many layers as take the selected rows past what any GPU's caches hold, four at least; of low-rank ones, which
    wait for multiplications rather than for memory and of which it would take hundreds, as many as there are."""
    if load.rank:
        return load
    return replace(load, layers=max(4, -(-_CACHES // load.bytes)))


def milliseconds(dut: DeviceUnderTest, work: Callable[[], None], rounds: int, repeats: int = 1) -> float:
    """The median time of ``work``, recorded as the backend's steps are and launched ``repeats`` times in a row."""
    replay = dut.accelerator.record(work)
    times = []
    for _ in range(rounds + 2):
        with Stopwatch(dut) as watch:
            for _ in range(repeats):
                replay()
        times.append(watch.milliseconds / repeats)
    return median(times[2:])


class Stopwatch:
    """Time on the device between two events; where there are none, as on a CPU, on the host's clock."""

    def __init__(self, dut: DeviceUnderTest) -> None:
        self._dut = dut
        self._events = dut.accelerator.device.type == "cuda"
        self.milliseconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._dut.accelerator.synchronize()
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        end = self._now()
        self._dut.accelerator.synchronize()
        start = self._start
        if isinstance(start, torch.cuda.Event):
            self.milliseconds = float(start.elapsed_time(end))
        else:
            self.milliseconds = 1000 * (end - start)

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._dut.accelerator.device))
        return event


def copy_bandwidth(dut: DeviceUnderTest, nbytes: int = 2**30, rounds: int = 20) -> float:
    """GB/s of a plain copy in device memory, read and written bytes counted both."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=dut.accelerator.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * nbytes / GB / (milliseconds(dut, copy, rounds) / 1000)


class Layers:
    """The pools of a few layers, a selection in each, and room for the results."""

    def __init__(self, dut: DeviceUnderTest, load: Load) -> None:
        device, dtype = dut.accelerator.device, row_type(load.shape)
        size = (load.batch * load.rows, load.kv_heads, load.head_dim)
        self.load = load
        self.pools = [[torch.randn(size, dtype=dtype, device=device) for _ in range(2)] for _ in range(load.layers)]
        self.query = torch.randn(load.batch, load.heads, load.head_dim, dtype=dtype, device=device)
        self.out = torch.empty_like(self.query)
        # Packed rows lie where exact ones would; what their bytes say makes no difference to the time.
        units = size[1] * size[2] * dtype.itemsize // UNIT if load.format != "exact" else 1
        self.rows = torch.cat([self._select(number) for number in range(load.batch)]).int().mul_(units).to(device)
        self.offsets = torch.arange(load.batch + 1, dtype=torch.int32, device=device) * load.selected
        self.slots = torch.full((load.batch,), -1, dtype=torch.int32, device=device)
        kernels = dut.kernels(load.shape)
        splits = kernels.splits(load.kv_heads, 4096)
        sizes = (load.shape, load.batch, load.heads, splits, self.rows.numel())
        self._space = Workspace.of(*sizes, scores=False, low_rank=load.rank > 0)
        self._scratch = torch.empty(self._space.bytes, dtype=torch.uint8, device=device)
        self._kernels, self._dut = kernels, dut
        # What a basis says makes no difference either, nor do the angles of a position.
        self._bases = torch.arange(load.batch * load.rank, dtype=torch.int32, device=device)
        self._positions = torch.arange(load.selected, dtype=torch.int32, device=device).repeat(load.batch)
        self._angles = torch.randn(load.selected, load.head_dim, dtype=dtype, device=device)

    def _select(self, sequence: int) -> Tensor:
        generator = torch.Generator().manual_seed(sequence)
        order = torch.randperm(self.load.rows, generator=generator)[: self.load.selected].sort().values
        return order + sequence * self.load.rows

    def selected(self) -> None:
        """Our kernels over the selected rows of every layer."""
        query, slots = self.query.data_ptr(), self.slots.data_ptr()
        rows, offsets, formats = self.rows.data_ptr(), self.offsets.data_ptr(), (self.load.format,)
        lists = Lists.of(rows, offsets, self.load.batch, self.rows.numel(), formats)
        # What a new row would be is not read, as every slot is negative.
        tables = (each.data_ptr() for each in (self._positions, self._angles))
        bases = Bases(self._bases.data_ptr(), self.load.rank, *tables) if self.load.rank else None
        written = formats if bases is None else ()
        step = Step(query, query, query, slots, lists, self.out.data_ptr(), written=written, bases=bases)
        for keys, values in self.pools:
            stream = self._dut.accelerator.stream()
            self._kernels.step(step, pool_of(keys, values), self._space, self._scratch.data_ptr(), stream)

    def full(self) -> None:
        """torch's fused attention over all rows of every layer, which lie as it likes them: apart for each head."""
        load = self.load
        query = self.query[:, :, None]
        for keys, values in self.pools:
            shape = (load.batch, load.kv_heads, load.rows, load.head_dim)
            functional.scaled_dot_product_attention(
                query, keys.view(shape), values.view(shape), enable_gqa=load.heads != load.kv_heads
            )


def attention(dut: DeviceUnderTest, load: Load, copy: float, rounds: int = 30) -> dict[str, Any]:
    """One layer's selected-row attention beside torch's full one; ``copy``: GB/s of a plain copy."""
    layers = Layers(dut, load)
    ours = milliseconds(dut, layers.selected, rounds) / load.layers
    full = milliseconds(dut, layers.full, rounds) / load.layers
    rate = load.bytes / GB / (ours / 1000)
    return {
        "batch": load.batch,
        "rows": load.rows,
        "selected": load.selected,
        "format": load.format,
        "ms": round(ours, 5),
        "gb_per_s": round(rate, 1),
        "of_copy_bandwidth": round(rate / copy, 3),
        "torch_full_ms": round(full, 5),
        "speedup": round(full / ours, 2),
    }


def attention_cases(dut: DeviceUnderTest, batches: Sequence[int] = (1, 4, 16), rounds: int = 30) -> dict[str, Any]:
    """All rows, and the core of 30 %, of LLaVA-1.6-7B's 2,340 image rows at every batch, and all rows packed and
    low-rank, as AttentionPack reads the important ones and the others."""
    copy = copy_bandwidth(dut, rounds=rounds)
    formats = ("exact", "int8", "int4", "lowrank:64", "lowrank:64@16")
    kinds = [("exact", 702), *((name, 2340) for name in formats)]
    loads = [beyond_caches(Load(batch, rows, format=name)) for batch in batches for name, rows in kinds]
    return {"copy_gb_per_s": round(copy, 1), "cases": [attention(dut, load, copy, rounds) for load in loads]}
