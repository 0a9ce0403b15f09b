"""Where checks run: a device and the kernels on it. Tests put the CPU and reference kernels here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from avl_edge.attention.cuda import Kernels, KernelShape
from avl_edge.backends.cuda import CudaBackend, kernel_shape
from avl_edge.backends.steps import Accelerator, CudaDevice
from avl_edge.config import KvShape
from avl_edge.kv.store import RowStore
from avl_edge.model.vision_language import VisionLanguageModel


class CheckFailed(Exception):
    """What was found to be wrong."""


class DeviceUnderTest(Protocol):
    """A device, and kernels for it by shape."""

    @property
    def accelerator(self) -> Accelerator: ...

    def kernels(self, shape: KernelShape) -> Kernels: ...


@dataclass
class GpuUnderTest:
    """GPU number ``index``; raises :class:`~avl_edge.attention.cuda.NoCuda` where there is none."""

    accelerator: CudaDevice
    _loaded: dict[KernelShape, Kernels] = field(default_factory=dict)

    def kernels(self, shape: KernelShape) -> Kernels:
        if shape not in self._loaded:
            self._loaded[shape] = Kernels.load(shape, self.accelerator.device.index or 0)
        return self._loaded[shape]


class Eager:
    """An accelerator that records nothing: each step is launched operator by operator."""

    def __init__(self, inner: Accelerator) -> None:
        self.device = inner.device
        self.stream, self.host_memory, self.synchronize = inner.stream, inner.host_memory, inner.synchronize

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        return step


def row_store(dut: DeviceUnderTest, model: VisionLanguageModel, pages: int) -> RowStore:
    """A pool on its device for a model's rows."""
    shape: KvShape = model.spec.text.kv_shape(model.dtype.itemsize)
    return RowStore(pages, shape, model.dtype, str(dut.accelerator.device))


def backend(dut: DeviceUnderTest, model: VisionLanguageModel, store: RowStore, *, eager: bool = False) -> CudaBackend:
    """A backend over a pool on its device, where ``model`` lies."""
    accelerator, kernels = dut.accelerator, dut.kernels(kernel_shape(model.spec.text, model.dtype))
    return CudaBackend(model, store, kernels, Eager(accelerator) if eager else accelerator)


def require(condition: bool, message: str) -> None:
    """Raise :class:`CheckFailed` unless a condition holds."""
    if not condition:
        raise CheckFailed(message)


def row_type(shape: KernelShape) -> torch.dtype:
    """The dtype of the rows that kernels of a shape take."""
    return torch.float16 if shape.row == "Half" else torch.bfloat16
