"""Rows of a pool as a batch attends them, and whether they fit a query."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...config import KvShape
from ...kv.layout import UNIT, Format

PACKED = ("int8", "int8/int4", "int4")


@dataclass(frozen=True)
class Part:
    """Rows of one format that a batch attends.

    Attributes:
        format: "exact", "int8", "int4" or "int8/int4".
        keys: exact: [R, H_kv, d] of the query's dtype, any strides while the last dimension is contiguous; packed: the
            arena, uint8 [bytes], contiguous, in which rows are records as :mod:`avl_edge.kv.formats` encodes them.
        values: likewise, as large as the keys; of "int8/int4" what `keys` is from the end of the first key's record on:
            there a row is one record, the value right behind the key.
        rows: [total] int32 on the CPU: row numbers in [0, R), or where records begin, in units of
            :data:`~avl_edge.kv.layout.UNIT` bytes. A row may serve several sequences.
        offsets: [B + 1] int32 on the CPU; sequence b attends rows[offsets[b]:offsets[b + 1]] of this part.

    The native kernel takes lists and arenas that are contiguous, and exact rows as above; the reference takes any.
    """

    format: str
    keys: Tensor
    values: Tensor
    rows: Tensor
    offsets: Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What attention over tensors of a dtype is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=64)
def record_bytes(name: str, kv_heads: int, dim: int) -> tuple[int, int]:
    """Bytes of a record of keys, and of one of values, in a packed format."""
    form, shape = Format(name), KvShape(1, kv_heads, dim, 1)
    return form.keys.record_bytes(shape), form.values.record_bytes(shape)


def id_limit(part: Part, kv_heads: int, dim: int) -> int:
    """How many ids a row of this part can have: 0 ... this - 1. A record has to end within its arena."""
    if part.format == "exact":
        return part.keys.shape[0]
    key, value = record_bytes(part.format, kv_heads, dim)
    return max(0, min(part.keys.numel() - key, part.values.numel() - value) // UNIT + 1)


def same_shape(part: Part) -> bool:
    """Whether keys and values have the shapes that they have in one pool."""
    return part.keys.shape == part.values.shape or Format(part.format).is_mixed


def check(query: Tensor, part: Part, kv_heads: int) -> list[int]:
    """Raise ValueError for arguments that do not fit together; the part's offsets as a list."""
    (batch, heads, dim), keys, values = query.shape, part.keys, part.values
    if part.format == "exact":
        fits = keys.dim() == 3 and keys.shape[1:] == (kv_heads, dim)
    elif part.format in PACKED:
        fits = keys.dim() == 1 and dim % 2 == 0 and keys.is_contiguous()
        fits = fits and values.dim() == 1 and values.is_contiguous()
    else:
        raise ValueError(f"a part is one of exact, {', '.join(PACKED)}, not {part.format!r}")
    if not fits or not same_shape(part) or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"query {list(query.shape)} does not fit {part.format} keys {list(keys.shape)}, "
            f"values {list(values.shape)} of {kv_heads} heads"
        )
    dtype = query.dtype if part.format == "exact" else torch.uint8
    if not dtype == keys.dtype == values.dtype:
        raise ValueError(f"query, keys and values are of one dtype, not {query.dtype}, {keys.dtype}, {values.dtype}")
    rows, offsets = part.rows, part.offsets
    if not (rows.dtype == offsets.dtype == torch.int32 and rows.is_cpu and offsets.is_cpu):
        raise ValueError(f"rows and offsets are int32 on the CPU, not {rows.dtype} and {offsets.dtype}")
    bounds: list[int] = offsets.tolist()
    if len(bounds) != batch + 1 or bounds[0] != 0 or bounds[-1] != rows.numel() or bounds != sorted(bounds):
        raise ValueError(f"offsets rise from 0 to the {rows.numel()} rows in {batch} steps, not {bounds}")
    return bounds


def check_ids(part: Part, kv_heads: int, dim: int) -> None:
    """Raise IndexError where an id of a part leads outside its pool."""
    rows, limit = part.rows, id_limit(part, kv_heads, dim)
    if not rows.numel() or 0 <= int(rows.min()) <= int(rows.max()) < limit:
        return
    if part.format == "exact":
        raise IndexError(f"a row id is outside the pool of {limit} rows")
    raise IndexError(f"a row id is outside the {part.format} arena of {part.keys.numel()} bytes")
