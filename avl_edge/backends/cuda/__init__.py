"""The torch backend on a GPU: rows in device memory, our kernels, one CUDA graph per kind of decode step."""

from __future__ import annotations

from .backend import CudaBackend, kernel_shape
from .model import load_model

__all__ = ["CudaBackend", "kernel_shape", "load_model"]
