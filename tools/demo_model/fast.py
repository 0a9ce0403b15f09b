"""Attention and RMS norm for training on a CPU.

PyTorch's own backward passes of both take most of a training step on a CPU without matrix units; written out as whole
passes over bfloat16 they take about two thirds of that time. On a GPU PyTorch's own are used.
"""

from __future__ import annotations

import os
from ctypes import CDLL, c_int
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Parameters of glibc's mallopt and their values: never give memory back to the system, never map blocks one by one.
_MALLOPT = {-1: 2**31 - 1, -2: 2**28, -3: 2**30}


def keep_freed_memory() -> None:
    """Let the C library keep freed tensors: fetching fresh pages for every one doubles the time of a step on a CPU."""
    mallopt = getattr(CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(c_int(parameter), c_int(value))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.scale = q.shape[-1] ** -0.5
        scores = torch.matmul(q * ctx.scale, k.mT)
        if bias is not None:
            scores += bias
        weights = torch.softmax(scores, -1)
        out = weights @ v
        ctx.save_for_backward(q, k, v, weights, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = gradients
        q, k, v, weights, out = ctx.saved_tensors
        grad_v = weights.mT @ grad
        inner = grad @ v.mT
        inner -= (grad * out).sum(-1, keepdim=True)
        inner *= weights
        return (inner @ k) * ctx.scale, (inner.mT @ q) * ctx.scale, grad_v, None


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of ``[B, H, N, D]`` over ``[B, H, M, D]``; ``bias`` ``[..., N, M]`` is added to the scores."""
    if q.device.type == "cpu" and q.requires_grad:
        out: Tensor = _Attention.apply(q, k, v, bias)  # type: ignore[no-untyped-call]
        return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, H * D]`` -> ``[B, H, N, D]``."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """``[B, H, N, D]`` -> ``[B, N, H * D]``."""
    return x.transpose(1, 2).flatten(2)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
        normed: Tensor = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = gradients
        normed, inverse, weight = ctx.saved_tensors
        grad_weight = (grad * normed).flatten(0, -2).sum(0, dtype=torch.float32)
        grad = grad * weight.to(grad.dtype)
        along = (grad * normed).mean(-1, keepdim=True)
        grad_x = torch.addcmul(grad, normed, along, value=-1) * inverse
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` ``[..., W]`` divided by its root mean square, times ``weight`` ``[W]``."""
    if x.device.type == "cpu" and weight.requires_grad and torch.is_grad_enabled():
        normed: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normed
    out: Tensor = F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
    return out
