"""The CUDA driver, by cuda-python: one GPU, and a module of kernels on it.

``cuda-python`` is optional, and so is a GPU: nothing is imported or opened before :class:`Gpu` is made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

from ...errors import BadInput
from ...optional import optional
from .errors import CudaError, NoCuda

Argument = ctypes.c_void_p | ctypes.c_int32
"""Of a kernel: a device pointer (None: null) or a number."""
Grid = tuple[int, int, int]


class Module(Protocol):
    """Kernels that can be launched: those of a GPU here, those of an emulation in tests."""

    def launch(self, kernel: str, grid: Grid, threads: int, stream: int, arguments: Sequence[Argument]) -> None:
        """Queue a kernel by name on a stream (0: the default one): ``grid`` blocks of ``threads``.

        Returns at once; raises :class:`CudaError` when the launch itself is refused.
        """
        ...


class Gpu:
    """A GPU and its primary context, which torch and TensorRT use too.

    ``arch`` like "sm_87"; ``multiprocessors``; ``shared_bytes`` of shared memory on each; ``cuda``: the (major, minor)
    version that the driver knows.
    """

    def __init__(self, index: int = 0) -> None:
        self._api = bindings()
        try:
            self._call("cuInit", 0)
        except CudaError as error:
            raise NoCuda(f"there is no CUDA GPU here ({error}): run it on a machine with one") from None
        except Exception as error:  # cuda-python raises errors of its own kinds where there is no libcuda
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NoCuda(f"there is no CUDA driver here ({reason}): run it on a machine with a GPU") from None
        (count,) = self._call("cuDeviceGetCount")
        if not 0 <= index < count:
            raise NoCuda(f"there is no GPU {index}, this machine has {count}: choose another")
        (self._device,) = self._call("cuDeviceGet", index)
        major, minor = self._attribute("COMPUTE_CAPABILITY_MAJOR"), self._attribute("COMPUTE_CAPABILITY_MINOR")
        self.arch = f"sm_{major}{minor}"
        if major < 8:
            raise NoCuda(f"GPU {index} is {self.arch}: the kernels need sm_80 or later")
        self.multiprocessors = self._attribute("MULTIPROCESSOR_COUNT")
        self.shared_bytes = self._attribute("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR")
        (version,) = self._call("cuDriverGetVersion")
        self.cuda = (version // 1000, version % 1000 // 10)

    def load(self, image: bytes) -> CudaModule:
        """A compiled module, in this GPU's context; it becomes the calling thread's where that has none."""
        (current,) = self._call("cuCtxGetCurrent")
        if not int(current):
            (context,) = self._call("cuDevicePrimaryCtxRetain", self._device)
            self._call("cuCtxSetCurrent", context)
        (module,) = self._call("cuModuleLoadData", image)
        return CudaModule(self._api, module)

    def _attribute(self, name: str) -> int:
        kind = getattr(self._api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        (value,) = self._call("cuDeviceGetAttribute", kind, self._device)
        return int(value)

    def _call(self, name: str, *arguments: object) -> tuple[Any, ...]:
        return _checked(self._api, name, *arguments)


class CudaModule:
    """A module on a GPU. It lives as long as the context: kernels may still run when Python forgets it."""

    def __init__(self, api: Any, module: Any) -> None:
        self._api, self._module = api, module
        self._functions: dict[str, Any] = {}

    def launch(self, kernel: str, grid: Grid, threads: int, stream: int, arguments: Sequence[Argument]) -> None:
        """As :class:`Module` says. The arguments are copied before this returns, also into a graph being captured."""
        addresses = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
        block, shared = (threads, 1, 1), 0
        where = self._api.CUstream(stream)
        _checked(
            self._api, "cuLaunchKernel", self._function(kernel), *grid, *block, shared, where,
            ctypes.addressof(addresses), 0,
        )  # fmt: skip

    def _function(self, kernel: str) -> Any:
        if kernel not in self._functions:
            (self._functions[kernel],) = _checked(self._api, "cuModuleGetFunction", self._module, kernel.encode())
        return self._functions[kernel]


def bindings() -> Any:
    """cuda-python's module of the driver's functions; :class:`NoCuda` where it is not installed."""
    try:
        return optional("cuda.bindings.driver", "a GPU")
    except BadInput:
        raise NoCuda("using a GPU needs cuda-python: pip install 'avl-edge[cuda]'") from None


def _checked(api: Any, name: str, *arguments: object) -> tuple[Any, ...]:
    """The results of a driver call without its status, which raises :class:`CudaError` when it is not success."""
    status, *results = getattr(api, name)(*arguments)
    if status != api.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{name} failed: {getattr(status, 'name', status)}")
    return tuple(results)
