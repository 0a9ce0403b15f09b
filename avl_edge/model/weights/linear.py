"""A linear layer's matrix in the format in which it is held: plain, or integers with a scale for each group of inputs.

Every checkpoint's format ends here. This is the torch path of the products: what the kernels are held to, and what runs
where there are none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weight_format import GROUPS

_TILE_ELEMENTS = 1 << 21


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


@dataclass(frozen=True)
class Dense:
    """A matrix ``weight [outputs, inputs]`` in a float dtype, and ``bias [outputs]``: ``[..., inputs] -> [...,
    outputs]``."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def outputs(self) -> int:
        return len(self.weight)

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """What one product reads."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[outputs, inputs]``."""
        return self.weight.to(dtype)

    def to(self, device: torch.device) -> Dense:
        return Dense(self.weight.to(device), _to(self.bias, device))

    def __call__(self, x: Tensor) -> Tensor:
        return _product(x, self.weight, self.bias)


@dataclass(frozen=True)
class Grouped:
    """Whole numbers of 8 or 4 bits; ``group`` neighbouring inputs of an output share a scale: ``[..., inputs] -> [...,
    outputs]``.

    ``bits`` 8: ``codes`` int8 ``[outputs, inputs]``, value = code * scale; any ``group`` that divides ``inputs``, which
    means one scale per output where it equals them.
    ``bits`` 4: ``codes`` uint8 ``[outputs, inputs / 2]``, input 2i in the low nibble and 2i + 1 in the high one, each 0
    to 15; value = (code - zero) * scale; a ``group`` of 32, 64 or 128.
    ``scales`` float32 ``[outputs, inputs / group]``. ``zeros`` uint8 of the same shape, 0 to 15, or None where all are
    8; of 8 bits always None.
    ``order`` int64 ``[inputs]``, or None where the columns of ``codes`` are in the order of the inputs: column i
    multiplies input ``order[i]``. Groups by activation order (GPTQ's ``desc_act``) become neighbours so. The inputs are
    gathered, not the outputs of the layer before: what gives them is read by several matrices, each with its own order.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    outputs: int
    inputs: int
    bias: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        code_type, columns = {8: (torch.int8, self.inputs), 4: (torch.uint8, self.inputs // 2)}[self.bits]
        assert self.inputs % self.group == 0, "groups divide the inputs"
        assert self.bits == 8 or self.group in GROUPS, "groups of 4-bit weights are those that kernels know"
        assert self.codes.dtype == code_type, "codes are of their width's dtype"
        assert self.codes.shape == (self.outputs, columns), "one code per weight"
        scales = (self.outputs, self.inputs // self.group)
        assert self.scales.dtype == torch.float32, "scales are float32"
        assert self.scales.shape == scales, "one scale per group"
        assert self.zeros is None or (self.bits == 4 and self.zeros.dtype == torch.uint8), "zeros are of 4-bit weights"
        assert self.zeros is None or self.zeros.shape == scales, "one zero per group"
        assert self.order is None or self.order.shape == (self.inputs,), "one place per input"

    @property
    def nbytes(self) -> int:
        """What one product reads."""
        parts = (self.codes, self.scales, self.zeros, self.bias, self.order)
        return sum(each.nbytes for each in parts if each is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[outputs, inputs]`` in the order of the inputs; products are taken in float32 and rounded once."""
        values = self._values().to(dtype)
        return values if self.order is None else torch.empty_like(values).index_copy_(1, self.order, values)

    def to(self, device: torch.device) -> Grouped:
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=_to(self.zeros, device),
            bias=_to(self.bias, device),
            order=_to(self.order, device),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """By tiles of outputs, so that what is dequantised at a time stays small."""
        if self.order is not None:
            x = x[..., self.order]
        step = max(1, _TILE_ELEMENTS // self.inputs)
        tiles = [self._tile(begin, min(begin + step, self.outputs)) for begin in range(0, self.outputs, step)]
        return torch.cat([_product(x, tile._values().to(x.dtype), tile.bias) for tile in tiles], -1)

    def _tile(self, begin: int, end: int) -> Grouped:
        """The outputs from ``begin`` to ``end``, whose columns are taken as they lie."""
        zeros = None if self.zeros is None else self.zeros[begin:end]
        bias = None if self.bias is None else self.bias[begin:end]
        codes, scales = self.codes[begin:end], self.scales[begin:end]
        return Grouped(codes, scales, zeros, self.bits, self.group, end - begin, self.inputs, bias)

    def _values(self) -> Tensor:
        """float32 ``[outputs, inputs]``, columns as they lie."""
        codes = self.codes if self.bits == 8 else torch.stack([self.codes & 15, self.codes >> 4], -1)
        values = codes.view(self.outputs, -1, self.group).float()
        if self.bits == 4:
            values -= 8 if self.zeros is None else self.zeros[..., None]
        return values.mul_(self.scales[..., None]).view(self.outputs, self.inputs)


LinearWeight = Dense | Grouped


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if slow_half(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def slow_half(x: Tensor) -> bool:
    """Whether float16 products over ``x`` ``[..., rows, size]`` are worth widening to float32, weights and all.

    Without float16 units torch multiplies matrices of halves many times slower than floats; a few rows, as in
    decoding, are bound by memory, and stay as they are.
    """
    return x.dtype == torch.float16 and x.device.type == "cpu" and x.shape[-2] > 8 and not _has_half_units()


@cache
def _has_half_units() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
