"""How a device's memory divides for a model: one longest prompt at a time, and the pool takes the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...machine.profile import DeviceProfile, Memory, Peaks
from ...model.sizes import ModelShape

_PICTURE = (336, 336)


@dataclass(frozen=True)
class Division:
    """Bytes. ``images``: pictures of the longest prompt. Vision and activations are not needed at once."""

    images: int
    weights_bytes: int
    vision_bytes: int
    activations_bytes: int
    overhead_bytes: int
    kv_pool_bytes: int


def divide(model: ModelShape, memory: Memory, peaks: Peaks) -> Division:
    """One longest prompt, of pictures as far as they go; 0 for the pool where the rest leaves nothing."""
    picture = model.picture(*_PICTURE)
    images = max(0, model.decoder.context - 1) // picture.tokens
    percent = peaks.workspace_percent.value / 100
    vision = math.ceil(percent * model.vision.peak_bytes([picture] * images, model.itemsize))
    activations = math.ceil(percent * model.activation_bytes(model.decoder.context, images * picture.tokens))
    weights, overhead = model.weight_bytes(model.stored), int(peaks.overhead_bytes.value)
    rest = memory.budget_bytes - weights - overhead - max(vision, activations)
    return Division(images, weights, vision, activations, overhead, max(0, rest))


def kv_pool_bytes(model: ModelShape, profile: DeviceProfile) -> int:
    """Bytes for the rows of all requests: the profile's own figure for this model, or what its memory leaves."""
    record = profile.record(model.name)
    if record.budgets is not None:
        return int(record.budgets.kv_pool_bytes.value)
    return divide(model, profile.memory, record.peaks).kv_pool_bytes
