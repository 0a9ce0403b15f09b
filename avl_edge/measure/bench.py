"""Decode attention timed: our kernel on selected rows where they lie, beside what torch can do with the same rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..attention import native
from ..attention.kernels import Part, attend, attend_parts
from ..config import KvShape, require
from ..kv.formats import encode
from ..kv.layout import UNIT, Format

_CACHES = 2**28
"""Bytes, beyond what any processor's caches hold."""
FORMATS = ("exact", "int8", "int8/int4", "int4")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One layer of one decode step: ``batch`` sequences of ``rows`` rows each, of which ``core_fraction`` is read.

    ``format`` is what our kernel finds the rows in; torch has them in ``dtype``.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    core_fraction: float
    dtype: str
    format: str = "exact"

    def __post_init__(self) -> None:
        fraction, heads, kv_heads = self.core_fraction, self.heads, self.kv_heads
        require(self.dtype in DTYPES, f"dtype {self.dtype!r} must be one of {', '.join(DTYPES)}")
        require(0 < fraction <= 1, f"the core fraction must be above 0 and at most 1, not {fraction}")
        require(heads % kv_heads == 0, f"{heads} heads cannot be shared by {kv_heads} key/value heads")
        require(self.format in FORMATS, f"format {self.format!r} must be one of {', '.join(FORMATS)}")
        packable = self.format == "exact" or self.head_dim % 2 == 0
        require(packable, f"rows of heads of size {self.head_dim} cannot be packed: it is odd")
        ids = self.batch * self.rows * max(1, self.record_step // UNIT)
        require(ids < 2**31, f"{self.batch} * {self.rows} rows are more than a pool can number")

    @property
    def core_rows(self) -> int:
        """Rows that a sequence reads."""
        return max(1, int(self.rows * Fraction(str(self.core_fraction))))

    @property
    def bytes(self) -> int:
        """Derived: all rows as the pool has them and as torch likes them, and the selected ones gathered twice."""
        row = 2 * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize
        packed = self.batch * self.rows * sum(self.record_bytes)
        return 2 * self.batch * (self.rows + self.core_rows) * row + packed + _CACHES

    @property
    def record_bytes(self) -> tuple[int, int]:
        """Bytes of a packed row's keys, and of its values; 0 for exact ones."""
        form, shape = Format(self.format), KvShape(1, self.kv_heads, self.head_dim, DTYPES[self.dtype].itemsize)
        return (0, 0) if form.is_exact else (form.keys.record_bytes(shape), form.values.record_bytes(shape))

    @property
    def record_step(self) -> int:
        """Bytes from a packed row to the next."""
        return sum(self.record_bytes) if Format(self.format).is_mixed else self.record_bytes[0]


def machine() -> dict[str, Any]:
    """What the times depend on beside the processor."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "native": native.available()}


@torch.inference_mode()
def attention(case: Case, rounds: int) -> dict[str, Any]:
    """The fields of ``case``, and ``ms``: the best of ``rounds`` calls of each way.

    ``native``: our kernel on the selected rows of the pool, in the case's format; ``slice_then_multiply``: torch
    gathers them, then attends; ``full``: torch attends to all rows; ``contiguous``: torch on selected rows gathered
    before. For torch, rows lie apart for each head, as it likes them; it attends by its fused kernel or by two matrix
    products, and slices there or from the pool, into memory that it was given before: the fastest counts. All take
    turns, so that a slow moment falls on all of them, and find nothing in the caches, as in a decode step, which reads
    all other layers and their weights in between.
    """
    ways, others = attention_ways(case), torch.zeros(_CACHES // 8, dtype=torch.int64)
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(rounds + 1):
        for name, functions in ways.items():
            fastest = min(_milliseconds(function, others) for function in functions)
            if turn:  # the first one finds no memory mapped and no threads started
                best[name] = min(best[name], fastest)
    return {**asdict(case), "ms": {name: round(ms, 4) for name, ms in best.items()}}


def _milliseconds(function: Callable[[], object], others: Tensor) -> float:
    others.sum()
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def attention_ways(case: Case) -> dict[str, Sequence[Callable[[], object]]]:
    """The ways of :func:`attention` over random rows, each as functions that compute the same numbers."""
    batch, rows, kv_heads, dim = case.batch, case.rows, case.kv_heads, case.head_dim
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPES[case.dtype]).normal_(generator=generator)

    query = draw(batch, case.heads, dim)
    pools = [draw(batch * rows, kv_heads, dim) for _ in range(2)]
    orders = [torch.randperm(rows, generator=generator)[: case.core_rows].sort().values for _ in range(batch)]
    chosen = torch.stack(orders)
    ids = (chosen + rows * torch.arange(batch)[:, None]).flatten()
    everything = [_apart(pool, batch).contiguous() for pool in pools]
    selected = [_apart(pool[ids], batch).contiguous() for pool in pools]
    room = [torch.empty_like(each) for each in selected]
    heads = torch.arange(batch * kv_heads).view(batch, kv_heads, 1)
    ids_apart = (chosen[:, None] + rows * heads).flatten()
    offsets = torch.arange(batch + 1, dtype=torch.int32) * case.core_rows

    def slice_pool() -> Tensor:
        return _fused(
            query, *(_apart(_slice(*pair, ids, kv_heads, dim), batch) for pair in zip(pools, room, strict=True))
        )

    def slice_apart(multiply: Callable[..., Tensor]) -> Tensor:
        shape = batch, kv_heads, case.core_rows, dim
        pairs = zip(everything, room, strict=True)
        return multiply(query, *(_slice(*pair, ids_apart, dim).view(shape) for pair in pairs))

    both = (_fused, _products)
    return {
        "native": [_native(case, query, pools, ids, offsets)],
        "slice_then_multiply": [slice_pool, *(partial(slice_apart, multiply) for multiply in both)],
        "full": [partial(multiply, query, *everything) for multiply in both],
        "contiguous": [partial(multiply, query, *selected) for multiply in both],
    }


def _native(
    case: Case, query: Tensor, pools: Sequence[Tensor], ids: Tensor, offsets: Tensor
) -> Callable[[], tuple[Tensor, object]]:
    scale, (keys, values) = case.head_dim**-0.5, pools
    if case.format == "exact":
        return partial(attend, query, keys, values, ids.int(), offsets, scale)
    begins = (ids * (case.record_step // UNIT)).int()
    part = Part(case.format, *_packed(case, keys, values), begins, offsets)
    return partial(attend_parts, query, [part], case.kv_heads, scale)


def _packed(case: Case, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as records, one after the other; few at a time, since on the way they are in float32."""
    form, (key, value) = Format(case.format), case.record_bytes
    if form.is_mixed:
        memory = torch.empty(len(keys), key + value, dtype=torch.uint8)
        sides, arenas = (memory[:, :key], memory[:, key:]), (memory.flatten(), memory.flatten()[key:])
    else:
        sides = (torch.empty(len(keys), key, dtype=torch.uint8), torch.empty(len(keys), value, dtype=torch.uint8))
        arenas = (sides[0].flatten(), sides[1].flatten())
    for own, rows, side in zip((form.keys, form.values), (keys, values), sides, strict=True):
        for some, into in zip(torch.split(rows, 64), torch.split(side, 64), strict=True):
            into.copy_(encode(own, some))
    return arenas


def _slice(rows: Tensor, into: Tensor, ids: Tensor, *shape: int) -> Tensor:
    """The rows ``ids`` of ``rows``, each of ``shape``, copied; new memory for them would cost more than the copy."""
    return torch.index_select(rows.view(-1, *shape), 0, ids, out=into.view(-1, *shape))


def _apart(rows: Tensor, batch: int) -> Tensor:
    """``[batch * n, kv_heads, d]`` as ``[batch, kv_heads, n, d]``."""
    return rows.view(batch, -1, *rows.shape[1:]).transpose(1, 2)


def _grouped(query: Tensor, keys: Tensor) -> Tensor:
    """The query heads that share keys as queries of one head, ``[batch, kv_heads, group, d]``: nothing is repeated."""
    return query.view(len(query), keys.shape[1], -1, query.shape[-1])


def _fused(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(_grouped(query, keys), keys, values)


def _products(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scaled = _grouped(query, keys) * query.shape[-1] ** -0.5
    return torch.matmul(torch.softmax(scaled @ keys.mT, -1), values)
