"""The few layers that the models share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import BadModel
from ..checkpoint import Weights


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that config.json calls ``name``."""
    if name not in _ACTIVATIONS:
        raise BadModel(f"activation {name!r} is not supported: it must be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


@dataclass(frozen=True)
class Linear:
    """``[..., inputs] -> [..., outputs]``."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def take(cls, weights: Weights, name: str, outputs: int, inputs: int, *, bias: bool) -> Linear:
        """``bias`` is what config.json says; a file that says otherwise is no match for it."""
        if not bias:
            weights.deny(f"{name}.bias")
        return cls(
            weights.take(f"{name}.weight", outputs, inputs), weights.take(f"{name}.bias", outputs) if bias else None
        )

    def __call__(self, x: Tensor) -> Tensor:
        if slow_half(x):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)
        return F.linear(x, self.weight, self.bias)


def slow_half(x: Tensor) -> bool:
    """Whether float16 products over ``x`` ``[..., rows, size]`` are worth widening to float32, weights and all.

    Without float16 units torch multiplies matrices of halves many times slower than floats; a few rows, as in
    decoding, are bound by memory, and stay as they are.
    """
    return x.dtype == torch.float16 and x.device.type == "cpu" and x.shape[-2] > 8 and not _has_half_units()


@cache
def _has_half_units() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@dataclass(frozen=True)
class LayerNorm:
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def take(cls, weights: Weights, name: str, size: int, eps: float) -> LayerNorm:
        return cls(weights.take(f"{name}.weight", size), weights.take(f"{name}.bias", size), eps)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class RmsNorm:
    """Root-mean-square norm, computed in float32 as the LLaMA family does in every dtype."""

    weight: Tensor
    eps: float

    @classmethod
    def take(cls, weights: Weights, name: str, size: int, eps: float) -> RmsNorm:
        return cls(weights.take(f"{name}.weight", size), eps)

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)
