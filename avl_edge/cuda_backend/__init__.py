"""The torch backend on a GPU: rows in device memory, our kernels, one CUDA graph per kind of decode step."""

from __future__ import annotations

from .backend import CudaBackend
from .device import Accelerator, CudaDevice
from .model import load_model
from .tables import Bucket, Reads, StepTables

__all__ = ["Accelerator", "Bucket", "CudaBackend", "CudaDevice", "Reads", "StepTables", "load_model"]
