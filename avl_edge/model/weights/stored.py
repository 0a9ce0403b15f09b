"""The tensors of one quantised linear layer as a checkpoint has them, checked as they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...errors import BadModel
from ..weight_format import GROUPS
from .linear import Grouped
from .packing import neighbours, nibbles, signed, split_group

CONVERT = ": make a checkpoint that is served from the model's 16-bit one with `avl-edge quantize`"
"""The end of a message about a format that is not served."""
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StoredLayer:
    """Layer ``name`` of ``outputs`` and ``inputs``; ``tensors`` by full name, ``bias [outputs]`` if it has one."""

    name: str
    outputs: int
    inputs: int
    tensors: Mapping[str, Tensor]
    bias: Tensor | None = None

    def has(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.tensors

    def take(self, part: str, *dtypes: torch.dtype) -> Tensor:
        """The tensor ``part``, of one of ``dtypes``; :class:`BadModel` names it."""
        tensor = self.tensors.get(f"{self.name}.{part}")
        if tensor is None:
            raise self.bad(part, "is missing, though the layer's other tensors are there: copy the checkpoint again")
        if tensor.dtype not in dtypes:
            raise self.bad(part, f"is stored as {tensor.dtype}, not as {' or '.join(map(str, dtypes))}{CONVERT}")
        return tensor

    def shaped(self, part: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """:meth:`take`, of ``shape``."""
        tensor = self.take(part, dtype)
        self.require_shape(part, tensor, shape)
        return tensor

    def require_shape(self, part: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise self.bad(
                part,
                f"has shape {list(tensor.shape)}, but a layer of {self.outputs} outputs and {self.inputs} inputs asks "
                f"for {list(shape)}: the checkpoint and its config.json do not match",
            )

    def scales(self, part: str) -> Tensor:
        """The scales as they are stored, two-dimensional."""
        scales = self.take(part, *_SCALES)
        if scales.ndim != 2 or 0 in scales.shape:
            raise self.bad(part, f"has shape {list(scales.shape)}: it must have a row and a column for each scale")
        return scales

    def groups(self, part: str, count: int) -> int:
        """``count``, which is that of the scales of an output; :class:`BadModel` where it does not divide the
        inputs."""
        if self.inputs % count:
            raise self.bad(part, f"has {count} groups, which do not divide {self.inputs} inputs{CONVERT}")
        return count

    def order(self, part: str, groups: int) -> Tensor | None:
        """See :func:`neighbours`, of the tensor ``part``."""
        try:
            return neighbours(self.shaped(part, torch.int32, self.inputs), groups)
        except ValueError as error:
            raise self.bad(part, f"{error}: the checkpoint is damaged, copy it again") from None

    def grouped(
        self, numbers: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, order: Tensor | None, part: str
    ) -> Grouped:
        """From uint8 ``numbers [outputs, inputs]`` in the order of the inputs, ``scales`` and ``zeros [outputs,
        groups]``; ``part`` is the tensor to name in :class:`BadModel`."""
        if order is not None:
            numbers = numbers[:, order]
        return self.packed(signed(numbers) if bits == 8 else nibbles(numbers), scales, zeros, bits, order, part)

    def packed(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, order: Tensor | None, part: str
    ) -> Grouped:
        """As :meth:`grouped`, from codes that are packed already and in the order of their columns."""
        centre = 1 << (bits - 1)
        if zeros is not None and bool((zeros == centre).all()):
            zeros = None
        if zeros is not None and bits == 8:
            raise self.bad(part, f"has 8-bit weights with zero points{CONVERT}")
        size = self.inputs // scales.shape[1]
        group = split_group(bits, size)
        if group is None:
            served = ", ".join(map(str, GROUPS))
            raise self.bad(part, f"has a scale for {size} inputs; 4-bit weights need groups of {served}{CONVERT}")
        scales = scales.float().repeat_interleave(size // group, 1).contiguous()
        zeros = None if zeros is None else zeros.repeat_interleave(size // group, 1).contiguous()
        return Grouped(codes, scales, zeros, bits, group, self.outputs, self.inputs, self.bias, order)

    def bad(self, part: str, reason: str) -> BadModel:
        return BadModel(f"{self.name}.{part} {reason}")


class QuantFormat(Protocol):
    """How a checkpoint stores the quantised ones of its linear layers."""

    def stores(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        """Whether ``tensors`` have layer ``name`` in this format; else it is plain."""
        ...

    def read(self, layer: StoredLayer) -> Grouped:
        """:class:`BadModel` names the tensor that is missing or does not fit."""
        ...
