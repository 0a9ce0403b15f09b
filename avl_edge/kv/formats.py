"""Keys or values as bytes: the records of the packed formats, and back. The layout is :mod:`avl_edge.kv.layout`'s.

A value is q * scale, and the scale is float16, rounded before q is taken. int8: q from -127 to 127, one scale per row
and head. int4: q from -8 to 7, one scale per row and group of dimensions, which has the sign that makes -8 of the value
of largest magnitude (of two, of the positive one), as llama.cpp's Q4_0: sixteen levels, where a symmetric code has
fifteen. The error is at most half a step, and at the other end of int4's range a whole one; or 127 (8) times 2^-25
where the scale is too small for full precision. Values beyond the largest scale become the largest there are; a NaN
makes NaNs of all values that share its scale. Nibbles are stored without sign, q + 128 and q + 8.

In each head's d/2 bytes, byte j holds dimension j in its low half and dimension j + d/2 in its high half. Of an int8
row all high nibbles come first: they alone are the row at 16 levels, which is what a coarse scan of the keys reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import UNIT, Format, groups, padded

_LARGEST_SCALE = 65504.0


def encode(format_: Format, rows: Tensor) -> Tensor:
    """``[n, heads, d]`` of any float dtype to records, uint8 ``[n, record_bytes]``."""
    if format_.name == "int8":
        q, scales = _quantize_int8(rows)
        biased = (q + 128).to(torch.uint8)
        return _join(scales, _pair(biased >> 4), _pair(biased & 15))
    q, scales = _quantize_int4(rows)
    return _join(scales, _pair((q + 8).to(torch.uint8)))


def decode(format_: Format, records: Tensor, heads: int, head_dim: int) -> Tensor:
    """Records as :func:`encode` makes them to float32 ``[n, heads, d]``."""
    count = 1 if format_.name == "int8" else groups(head_dim)
    scales, begin = _scales(records, heads, count)
    first = _unpair(records, begin, heads, head_dim)
    if format_.name == "int8":
        second = _unpair(records, begin + padded(heads * head_dim // 2), heads, head_dim)
        return _scaled(first * 16 + second - 128, scales)
    return _scaled(first - 8, scales)


def decode_coarse(records: Tensor, heads: int, head_dim: int) -> Tensor:
    """The high nibbles of int8 records alone, each at the middle of its 16 values: float32 ``[n, heads, d]``."""
    scales, begin = _scales(records, heads, 1)
    return _scaled(_unpair(records, begin, heads, head_dim) * 16 + 8 - 128, scales)


def encode_coefficients(format_: Format, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Coefficients ``[n, R]`` of a low-rank format to records; ``dtype`` is the model's."""
    if not format_.packs_coefficients:
        return _join(rows.to(dtype).contiguous().view(torch.uint8))
    q, scales = _quantize_int8(rows[:, None])
    return _join(torch.cat([scales.flatten(1).view(torch.uint8), q.flatten(1).to(torch.int8).view(torch.uint8)], 1))


def decode_coefficients(format_: Format, records: Tensor, dtype: torch.dtype) -> Tensor:
    """Records as :func:`encode_coefficients` makes them to float32 ``[n, R]``."""
    assert format_.rank is not None
    if not format_.packs_coefficients:
        return records[:, : format_.rank * dtype.itemsize].contiguous().view(dtype).float()
    scales = records[:, :2].contiguous().view(torch.float16).float()
    return records[:, 2 : 2 + format_.rank].contiguous().view(torch.int8).float() * scales


def _quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers, float32 ``[n, heads, d]``, and scales, float16 ``[n, heads, 1]``."""
    wide = rows.float()[:, :, None]
    return _divided(wide, wide.abs().amax(-1) / 127, -127, 127)


def _quantize_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers, float32 ``[n, heads, d]``, and scales, float16 ``[n, heads, groups]``."""
    count = groups(rows.shape[2])
    grouped = rows.float().view(*rows.shape[:2], count, rows.shape[2] // count)
    low, high = torch.aminmax(grouped, dim=-1)
    largest = torch.where(high >= -low, high, low) + 0.0  # of zeros there is one: records are the same on every device
    return _divided(grouped, largest / -8, -8, 7)


def _divided(grouped: Tensor, scales: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """``grouped`` ``[n, heads, groups, ...]`` by their ``scales``, as whole numbers ``[n, heads, d]``; the scales as
    they are stored."""
    scales = scales.clamp(-_LARGEST_SCALE, _LARGEST_SCALE).half()
    step = scales.float()[..., None]
    return torch.where(step != 0, grouped / step, 0.0).round().clamp(lowest, highest).flatten(2), scales


def _scaled(q: Tensor, scales: Tensor) -> Tensor:
    return (q.view(*scales.shape, q.shape[2] // scales.shape[2]) * scales[..., None]).flatten(2)


def _pair(nibbles: Tensor) -> Tensor:
    """``[n, heads, d]`` of 0 ... 15 to bytes ``[n, heads * d / 2]``."""
    low, high = nibbles.chunk(2, -1)
    return (low | (high << 4)).flatten(1)


def _unpair(records: Tensor, begin: int, heads: int, head_dim: int) -> Tensor:
    pairs = records[:, begin : begin + heads * head_dim // 2].view(len(records), heads, head_dim // 2)
    return torch.cat([pairs & 15, pairs >> 4], -1).float()


def _join(*sections: Tensor) -> Tensor:
    """Sections of ``n`` records each, as bytes, each padded to whole units."""
    parts = [section.flatten(1).contiguous().view(torch.uint8) for section in sections]
    return torch.cat([torch.nn.functional.pad(part, (0, -part.shape[1] % UNIT)) for part in parts], 1)


def _scales(records: Tensor, heads: int, count: int) -> tuple[Tensor, int]:
    """Float32 scales ``[n, heads, count]``, and where the next section begins."""
    size = 2 * heads * count
    halves = records[:, :size].contiguous().view(torch.float16)
    return halves.float().view(len(records), heads, count), padded(size)
