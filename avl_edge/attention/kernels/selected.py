"""Attention of one new token per sequence over the rows that it selects: the native kernel, or the reference."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kv.layout import Format
from .. import native
from .parts import PACKED, Part, id_limit, same_shape
from .reference import attend_parts_reference, coarse_weights_reference

_EXACT = {getattr(torch, name): native.FORMATS[name] for name in ("float32", "bfloat16", "float16")}
_PACKED = {name: [native.FORMATS[each.name] for each in (Format(name).keys, Format(name).values)] for name in PACKED}
"""The numbers of keys' and of values' formats."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: float,
    *,
    scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new token per sequence over exact rows: :func:`attend_parts` of one part.

    Args:
        query: [B, H, d], float32, bfloat16, float16 or float64.
        keys, values, rows, offsets: as in an exact :class:`Part`.
        scale: factor of the logits, 1 / sqrt(d) as a rule.
        scores: whether to return the attention that each row received.

    Returns:
        out [B, H, d] and, when asked, the scores [total].

    Raises:
        ValueError, IndexError: as :func:`attend_parts`.
    """
    part = Part("exact", keys, values, rows, offsets)
    out, weights = attend_parts(query, [part], keys.shape[1], scale, scores=scores)
    return out, weights[0] if weights else None


def attend_parts(
    query: Tensor, parts: Sequence[Part], kv_heads: int, scale: float, *, scores: bool = False
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Attention of one new token per sequence over the rows of all parts together; nothing is gathered or unpacked.

    Args:
        query: [B, H, d], float32, bfloat16, float16 or float64; packed rows need an even d.
        parts: rows by format, none of which needs to have any for a sequence.
        kv_heads: H_kv, of all parts.
        scale: factor of the logits, 1 / sqrt(d) as a rule.
        scores: whether to return the attention that each row received.

    Returns:
        out [B, H, d] in query's dtype, zeros for a sequence that selects no row; and, when asked, the scores of each
        part [total], float32 (float64 for float64): the softmax weight of each row, averaged over the H heads, 1 in sum
        over all parts per sequence.

    Raises:
        ValueError: shapes, dtypes, formats or offsets do not fit together.
        IndexError: a row id outside its pool. Every call checks every id: next to reading a row it costs nothing.

    A sequence's results are the same, bit for bit, with any number of threads and in any batch.
    """
    query = query.contiguous()
    out, weights = torch.empty_like(query), _new_weights(parts) if scores else None
    if not _run(query, parts, kv_heads, scale, out, weights):
        return attend_parts_reference(query, parts, kv_heads, scale, scores=scores)
    return out, None if weights is None else torch.split(weights, [part.rows.numel() for part in parts])


def coarse_weights(query: Tensor, part: Part, kv_heads: int, scale: float) -> Tensor:
    """The softmax weights that a scan of the keys alone would give to rows: for choosing which of them to attend.

    Args:
        query: [B, H, d], float32, bfloat16, float16 or float64.
        part: the rows to choose from. Of int8 keys only the scales and the high nibbles are read, half of their bytes;
            of other formats the keys as they are. Values are never read.
        kv_heads: H_kv.
        scale: factor of the logits.

    Returns:
        [total] float32 (float64 for float64): averaged over the H heads, 1 in sum per sequence.

    Raises:
        ValueError, IndexError: as :func:`attend_parts`.

    A sequence's results are the same, bit for bit, with any number of threads and in any batch.
    """
    query, weights = query.contiguous(), _new_weights([part])
    if not _run(query, [part], kv_heads, scale, None, weights, coarse=True):
        return coarse_weights_reference(query, part, kv_heads, scale)
    return weights


def _new_weights(parts: Sequence[Part]) -> Tensor:
    return torch.empty(sum(part.rows.numel() for part in parts), dtype=torch.float32)


def _run(
    query: Tensor,
    parts: Sequence[Part],
    kv_heads: int,
    scale: float,
    out: Tensor | None,
    weights: Tensor | None,
    *,
    coarse: bool = False,
) -> bool:
    """Have the kernel fill in `out` and `weights`. False where it is missing or does not take these arguments.

    It takes whatever is right and lies in the CPU's memory as it likes it; the reference takes the rest, and says what
    is wrong with what is not. So each call is checked once, mostly in C++: next to a step's other work in caches gone
    cold, every call into torch or Python would be felt.
    """
    function, dtype = native.core_attention(), query.dtype
    if function is None or dtype not in _EXACT or not query.is_cpu:
        return False
    batch, heads, dim = query.shape
    if kv_heads < 1 or heads % kv_heads or not dim:
        return False
    described = []
    for part in parts:
        if not _is_readable(part, dtype, batch, kv_heads, dim):
            return False
        described.append(_describe(part, kv_heads, dim, coarse))
    call = native.CALL.pack(
        query.data_ptr(),
        0 if out is None else out.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        len(parts),
        batch,
        heads,
        kv_heads,
        dim,
        _EXACT[dtype],
        torch.get_num_threads(),
        scale,
    )
    status = function(call, b"".join(described))
    if status == errno.ENOMEM:
        raise MemoryError("the attention kernel could not allocate its scratch")
    return status == 0


def _is_readable(part: Part, dtype: torch.dtype, batch: int, kv_heads: int, dim: int) -> bool:
    """Whether the kernel can read a part beside such a query, if its offsets and ids are right."""
    keys, values, rows, offsets = part.keys, part.values, part.rows, part.offsets
    if not same_shape(part) or keys.dtype != values.dtype:
        return False
    if part.format == "exact":
        fits = keys.dtype == dtype and keys.shape[1:] == (kv_heads, dim) and keys.stride(2) == values.stride(2) == 1
    else:
        fits = part.format in PACKED and keys.dtype == torch.uint8 and keys.dim() == values.dim() == 1 and dim % 2 == 0
        fits = fits and keys.is_contiguous() and values.is_contiguous()
    return (
        fits
        and rows.dtype == offsets.dtype == torch.int32
        and offsets.numel() == batch + 1
        and rows.is_contiguous()
        and offsets.is_contiguous()
        and keys.is_cpu
        and values.is_cpu
        and rows.is_cpu
        and offsets.is_cpu
    )


def _describe(part: Part, kv_heads: int, dim: int, coarse: bool) -> bytes:
    """A readable part as the library takes it."""
    keys, values, rows, exact = part.keys, part.values, part.rows, part.format == "exact"
    strides = (*keys.stride()[:2], *values.stride()[:2]) if exact else (0, 0, 0, 0)
    key_format, value_format = (_EXACT[keys.dtype],) * 2 if exact else _PACKED[part.format]
    if coarse and key_format == native.FORMATS["int8"]:
        key_format = native.FORMATS["coarse int8"]
    return native.PART.pack(
        keys.data_ptr(),
        values.data_ptr(),
        rows.data_ptr(),
        part.offsets.data_ptr(),
        *strides,
        id_limit(part, kv_heads, dim),
        rows.numel(),
        key_format,
        value_format,
    )
