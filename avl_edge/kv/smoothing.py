"""Keys made even before they are packed: an affine change per layer, head and channel.

Models with biases on their keys (Qwen2's) have a few channels tens of times larger than the others. These set the scale
of every packed row, and the others drown in its step. So a sequence with packed rows stores, in place of a key k,

    k' = (k - center) / scale

in all its rows, exact ones included, and asks with q' = q * scale. A constant that is taken from all keys of a layer
adds the same to each logit of a query, which no softmax sees (SageAttention, arXiv 2410.02367, smooths K so); and
q' . k' = q . (k - center), as SmoothQuant (arXiv 2211.10438) moves the range of one factor into the other. Each row is
still packed by itself, and what attends reads rows as ever.

Both are fixed when the prompt is stored, for all tokens to come. RoPE turns a bias by the position, so that keys of
later positions lie where none of the prompt's do; but before RoPE keys are alike at all positions. So ``center`` is the
middle of the arc on which RoPE carries the mean key over all positions that the sequence may reach, and ``scale`` half
of that arc and three standard deviations of what is left, over the largest of the head's channels. They lie in the pool
as one exact row per layer: ``center`` where a key would be, ``scale`` where a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.network.rope import rotate, unrotate

Angles = Callable[[Tensor], tuple[Tensor, Tensor]]
"""RoPE's cosines and sines ``[n, 1, d]`` for int64 positions ``[n]``."""

_SMALLEST_SCALE = 2.0**-6
"""Of a channel that hardly varies in the prompt: what comes later may vary more, and has to stay a number."""
_SAMPLES = 128
"""Positions, from the first to the last, by which the way of the mean key is followed."""
_DEVIATIONS = 3
"""Measured on Qwen2.5-Coder-0.5B: the divergence of int4 attention is 15 % lower than with the standard deviation of
rotated keys as the scale, since a turning bias has no tail, and hardly changes from 2.5 to 3."""


@dataclass(frozen=True)
class Smoothing:
    """``center`` and ``scale``, each ``[..., H_kv, d]`` in the model's dtype: of one layer, or of a batch of
    sequences."""

    center: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, keys: Tensor, positions: Tensor, reach: int, angles: Angles) -> Smoothing:
        """That of a prompt's ``keys`` ``[m, H_kv, d]``, after RoPE at int64 ``positions`` ``[m]``, for a sequence of up
        to ``reach`` tokens."""
        before = unrotate(keys, *angles(positions))
        mean = before.mean(0)
        samples = torch.arange(_SAMPLES, device=keys.device) * (reach - 1) // (_SAMPLES - 1)
        cos, sin = (each.to(before.dtype) for each in angles(samples))
        low, high = torch.aminmax(rotate(mean.expand(len(samples), *mean.shape), cos, sin), dim=0)
        extent = (high - low) / 2 + _DEVIATIONS * _rotated_variance(before - mean, cos, sin).clamp(min=0).sqrt()
        # What is no number in a key must not spread: such a channel stays as it is.
        sound = extent.isfinite()
        largest = torch.where(sound, extent, 0).amax(-1, keepdim=True)
        scale = torch.where(sound & (largest > 0), extent / largest, 1).clamp(min=_SMALLEST_SCALE)
        return cls(torch.where(sound, (low + high) / 2, 0).to(keys.dtype), scale.to(keys.dtype))

    def keys(self, keys: Tensor) -> Tensor:
        """``keys`` ``[n, H_kv, d]`` as they are stored."""
        return (keys - self.center) / self.scale

    def original(self, stored: Tensor) -> Tensor:
        """Stored keys ``[n, H_kv, d]`` as the model made them."""
        return stored * self.scale + self.center

    def query(self, query: Tensor) -> Tensor:
        """``query`` ``[n, H, d]`` as it meets stored keys."""
        grouped = query.view(len(query), self.scale.shape[-2], -1, query.shape[2])
        return (grouped * self.scale.unsqueeze(-2)).view_as(query)


def _rotated_variance(rest: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The variance ``[H_kv, d]`` of ``rest`` ``[m, H_kv, d]``, whose mean is 0, when RoPE carries it everywhere."""
    first, second = rest.chunk(2, dim=-1)
    one, other, both = first.square().mean(0), second.square().mean(0), (first * second).mean(0)
    cos, sin = (each.chunk(2, dim=-1)[0] for each in (cos, sin))
    cos2, sin2, mixed = cos.square().mean(0), sin.square().mean(0), 2 * both * (cos * sin).mean(0)
    return torch.cat([one * cos2 + other * sin2 - mixed, one * sin2 + other * cos2 + mixed], dim=-1)
