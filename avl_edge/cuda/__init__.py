"""The GPU's kernels: their source found, compiled and cached (`compile`), loaded and launched (`launch`).

Imports without CUDA; a GPU and ``cuda-python`` are needed by :meth:`Kernels.load` alone, NVRTC by :func:`cubin`.
"""

from __future__ import annotations

from .compile import DTYPES, KernelShape, cubin
from .driver import Gpu, Module
from .errors import CompileFailed, CudaError, NoCuda
from .launch import Kernels, Pool, PromptHeads, Step, Workspace
from .source import digest

__all__ = [
    "DTYPES",
    "CompileFailed",
    "CudaError",
    "Gpu",
    "KernelShape",
    "Kernels",
    "Module",
    "NoCuda",
    "Pool",
    "PromptHeads",
    "Step",
    "Workspace",
    "cubin",
    "digest",
]
