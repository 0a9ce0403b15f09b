"""Rotary position embedding (arXiv 2104.09864) and the context extensions that checkpoints ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import BadModel


class Rope:
    """Rotations by position. Frequencies are float32, as in transformers, whatever the model's dtype."""

    _axes: Tensor | None = None  # which axis of a position each frequency turns by

    def __init__(self, head_dim: int, parameters: Mapping[str, Any]) -> None:
        kind = parameters["rope_type"]
        if kind not in ROPE_TYPES:
            raise BadModel(f"RoPE scaling {kind!r} is not supported: it must be one of {', '.join(ROPE_TYPES)}")
        try:
            self._frequencies, self._magnitude = ROPE_TYPES[kind](head_dim, parameters)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise BadModel(f"RoPE scaling {kind!r} lacks a parameter or has a wrong one: {error}") from None
        if not (torch.isfinite(self._frequencies).all() and (self._frequencies > 0).all() and self._magnitude > 0):
            raise BadModel(f"RoPE scaling {kind!r} gives frequencies that are not positive: check {dict(parameters)}")

        if parameters.get("mrope_section") is not None:
            self._axes = _axes(parameters["mrope_section"], head_dim, bool(parameters.get("mrope_interleaved")))

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[n, 1, head_dim]`` for whole ``positions``: ``[n]``, which hold for all axes that there
        are, or ``[axes, n]``."""
        if positions.dim() == 2:
            positions = positions[0] if self._axes is None or len(positions) == 1 else positions[self._axes].T
        turned = positions.float() if positions.dim() == 2 else positions.float()[:, None]
        angles = turned * self._frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return (angles.cos() * self._magnitude).to(dtype), (angles.sin() * self._magnitude).to(dtype)


def _axes(sections: Any, head_dim: int, interleaved: bool) -> Tensor:
    """M-RoPE (arXiv 2409.12191): which axis of a position each frequency turns by, int64 ``[head_dim / 2]``. Sections
    are numbers of frequencies, one after the other, or time, row and column in turns as far as their numbers go."""
    numbers = isinstance(sections, list) and all(type(each) is int and each >= 0 for each in sections)
    if not numbers or len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise BadModel(f"mrope_section must be 3 numbers with the sum {head_dim // 2}, not {sections!r}")
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    axes = torch.zeros(head_dim // 2, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``[n, heads, head_dim]``; the halves of a head are the pairs (the GPT-NeoX layout)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What :func:`rotate` made ``x`` ``[n, heads, head_dim]`` of, float32 (float64 for float64); the angles may have a
    magnitude."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    return rotate(x.to(wide), cos, -sin) / (cos.square() + sin.square())


def _plain(dim: int, parameters: Mapping[str, Any]) -> tuple[Tensor, float]:
    # "dynamic" is here too: it changes nothing up to max_position_embeddings, which is where the context ends.
    theta = float(parameters["rope_theta"])
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0


def _linear(dim: int, parameters: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Position interpolation (arXiv 2306.15595)."""
    frequencies, magnitude = _plain(dim, parameters)
    return frequencies / parameters["factor"], magnitude


def _llama3(dim: int, parameters: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    frequencies, magnitude = _plain(dim, parameters)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / parameters["factor"] + kept * frequencies, magnitude


def _yarn(dim: int, parameters: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071), section 3.2: NTK by parts, and the temperature as a factor on cos and sin."""
    frequencies, _ = _plain(dim, parameters)
    factor = parameters["factor"]
    original = parameters["original_max_position_embeddings"]
    low = _dimension(parameters.get("beta_fast") or 32, dim, original, parameters["rope_theta"])
    high = _dimension(parameters.get("beta_slow") or 1, dim, original, parameters["rope_theta"])
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    stretched = ramp.clamp(0, 1)
    magnitude = parameters.get("attention_factor") or _yarn_magnitude(factor, parameters)
    return frequencies / factor * stretched + frequencies * (1 - stretched), magnitude


def _dimension(rotations: float, dim: int, context: int, theta: float) -> float:
    """The dimension that makes ``rotations`` turns over ``context`` positions."""
    return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_magnitude(factor: float, parameters: Mapping[str, Any]) -> float:
    def scaled(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scaled(parameters["mscale"]) / scaled(parameters["mscale_all_dim"])
    return scaled(1.0)


ROPE_TYPES = {"default": _plain, "dynamic": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
"""By ``rope_type``: from a head's size and the config's parameters to float32 frequencies ``[head_dim / 2]`` and the
magnitude of cosines and sines."""
