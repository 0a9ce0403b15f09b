"""The backend of TensorRT engines: prompts and steps as a package's engines run them, over the rows of the pool."""

from __future__ import annotations

from .backend import EngineBackend
from .engines import Engines, Runner

__all__ = ["EngineBackend", "Engines", "Runner"]
