"""Where a model runs, one file each. To add one: write its file, name its class here."""

from __future__ import annotations

from .base import Loaded, Place
from .cpu import Cpu
from .cuda import Cuda

PLACES: dict[str, type[Place]] = {"cpu": Cpu, "cuda": Cuda}
"""By the name that people give as the device."""

__all__ = ["PLACES", "Loaded", "Place"]
