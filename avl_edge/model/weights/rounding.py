"""A plain matrix rounded to whole numbers: the nearest, at the scale that leaves the least error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weight_format import WeightFormat
from .linear import Grouped
from .packing import nibbles

_SHARES = {8: (1.0,), 4: tuple(share / 20 for share in range(12, 23))}
"""Scales that are tried, as shares of the one that just reaches a group's largest number: a smaller one cuts that off,
and is finer for all others."""
_SLICE_ELEMENTS = 1 << 22


def pack(weight: Tensor, form: WeightFormat, scale_dtype: torch.dtype | None = None) -> Grouped:
    """``weight [outputs, inputs]`` as ``form``, symmetric; :class:`BadInput` where groups do not divide its inputs.

    A group's scale is, of those tried, the one with the least squared error. Scales are float32, and numbers of
    ``scale_dtype`` (None: of the weight's), so that a checkpoint of that dtype holds them as they are.
    """
    outputs, inputs = weight.shape
    form.require_divides(inputs)
    group = form.group or inputs
    codes, scales = [], []
    for part in torch.split(weight, max(1, _SLICE_ELEMENTS // inputs)):
        grouped = part.float().view(len(part), -1, group)
        found, scale = _nearest(grouped, form.bits, scale_dtype or weight.dtype)
        codes.append(found.flatten(1).to(torch.int8) if form.bits == 8 else nibbles((found.flatten(1) + 8).byte()))
        scales.append(scale)
    return Grouped(torch.cat(codes), torch.cat(scales), None, form.bits, group, outputs, inputs)


def _nearest(weight: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whole numbers for ``weight [outputs, groups, group]``, in float32, and scales ``[outputs, groups]``."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    reach = weight.abs().amax(-1) / high
    best, least = reach.to(dtype).float(), torch.full_like(reach, torch.inf)
    for share in _SHARES[bits]:
        # For the numbers that a scale gives, the best scale is that of least squares.
        numbers = _whole(weight, reach * share, low, high)
        scale = ((numbers * weight).sum(-1) / numbers.square().sum(-1)).nan_to_num_().to(dtype).float()
        loss = (_whole(weight, scale, low, high) * scale[..., None] - weight).square_().sum(-1)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return _whole(weight, best, low, high), best


def _whole(weight: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """``weight`` in whole steps of ``scales``; 0 where the step is 0."""
    return (weight / scales[..., None]).nan_to_num_(0.0).round_().clamp_(low, high)
