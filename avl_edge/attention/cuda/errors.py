"""What can be wrong between here and the GPU. Each message ends with what to do."""

from __future__ import annotations

from ...errors import AvlEdgeError, BadInput


class NoCuda(BadInput):
    """A part of CUDA that is not on this machine: a GPU with its driver, cuda-python, or the run-time compiler."""


class CompileFailed(AvlEdgeError):
    """The kernels do not compile; the message ends with the compiler's log."""


class CudaError(AvlEdgeError):
    """A call of the CUDA driver failed."""
