"""The GPU's kernels: their source found, compiled and cached (`compile`), loaded and launched (`launch`).

Imports without CUDA; a GPU and ``cuda-python`` are needed by :meth:`Kernels.load` alone, NVRTC by :func:`cubin`.
"""

from __future__ import annotations

from .compile import DTYPES, FORMATS, LOW_RANK, KernelShape, compiled, cubin, in_order, reader
from .driver import Gpu, Module
from .errors import CompileFailed, CudaError, NoCuda
from .launch import Kernels
from .pointers import Bases, Lists, Pool, PromptHeads, Scan, Step, Workspace
from .source import digest

__all__ = [
    "DTYPES",
    "FORMATS",
    "LOW_RANK",
    "Bases",
    "CompileFailed",
    "CudaError",
    "Gpu",
    "KernelShape",
    "Kernels",
    "Lists",
    "Module",
    "NoCuda",
    "Pool",
    "PromptHeads",
    "Scan",
    "Step",
    "Workspace",
    "compiled",
    "cubin",
    "digest",
    "in_order",
    "reader",
]
