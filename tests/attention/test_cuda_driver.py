"""The CUDA driver's door without a GPU: what is asked of cuda-python, and what is said where something is missing."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from avl_edge.attention.cuda import CudaError, Gpu, NoCuda
from avl_edge.attention.cuda import driver as driver_module


def test_without_cuda_python_it_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(NoCuda, match=r"needs cuda-python: pip install 'avl-edge\[cuda\]'"):
        Gpu()


class FakeDriver:
    """The part of cuda-python's driver API that is used, answering for one GPU."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers = {"cuDeviceGetCount": (1,), "cuDeviceGet": ("gpu",), "cuDriverGetVersion": (12060,), **answers}
        self.values = {"COMPUTE_CAPABILITY_MAJOR": 8, "COMPUTE_CAPABILITY_MINOR": 7, "MULTIPROCESSOR_COUNT": 16}

    def CUstream(self, handle: int) -> tuple[str, int]:
        return "stream", handle

    @property
    def CUdevice_attribute(self) -> Any:
        names = [*self.values, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"]
        return SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{name}": name for name in names})

    def cuDeviceGetAttribute(self, name: str, _: object) -> tuple[int, int]:
        return 0, self.values.get(name, 167936)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            answer = self.answers.get(name, ())
            if isinstance(answer, Exception):
                raise answer
            return answer if answer and answer[0] == "error" else (0, *answer)

        return call


def _gpu(monkeypatch: pytest.MonkeyPatch, api: FakeDriver, index: int = 0) -> Gpu:
    monkeypatch.setattr(driver_module, "bindings", lambda: api)
    return Gpu(index)


def test_a_gpu_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _gpu(monkeypatch, FakeDriver())
    assert (gpu.arch, gpu.multiprocessors, gpu.shared_bytes, gpu.cuda) == ("sm_87", 16, 167936, (12, 6))


@pytest.mark.parametrize(
    ("answers", "index", "message"),
    [
        ({"cuInit": RuntimeError("libcuda.so.1 was not found\nlong explanation")}, 0, "no CUDA driver here"),
        ({"cuInit": ("error",)}, 0, "no CUDA GPU here"),
        ({}, 1, "no GPU 1, this machine has 1"),
    ],
)
def test_no_gpu_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], index: int, message: str
) -> None:
    with pytest.raises(NoCuda, match=message) as error:
        _gpu(monkeypatch, FakeDriver(**answers), index)
    assert "\n" not in str(error.value)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeDriver()
    api.values["COMPUTE_CAPABILITY_MAJOR"] = 7
    with pytest.raises(NoCuda, match="sm_77: the kernels need sm_80"):
        _gpu(monkeypatch, api)


@pytest.mark.parametrize("current", [0, 5])
def test_a_module_is_loaded_into_a_context_and_launched(monkeypatch: pytest.MonkeyPatch, current: int) -> None:
    api = FakeDriver(
        cuCtxGetCurrent=(current,),
        cuDevicePrimaryCtxRetain=("context",),
        cuModuleLoadData=("module",),
        cuModuleGetFunction=("function",),
    )
    module = _gpu(monkeypatch, api).load(b"image")
    retained = [call for call in api.calls if call[0] in ("cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")]
    assert len(retained) == (0 if current else 2), "a context that is there is used"
    arguments = [ctypes.c_void_p(4096), ctypes.c_int32(-7)]
    for _ in range(2):
        module.launch("avl_merge", (2, 3, 4), 128, 77, arguments)
    assert [call for call in api.calls if call[0] == "cuModuleGetFunction"] == [
        ("cuModuleGetFunction", "module", b"avl_merge")
    ]
    launch = next(call for call in api.calls if call[0] == "cuLaunchKernel")
    assert launch[1:10] == ("function", 2, 3, 4, 128, 1, 1, 0, ("stream", 77))
    assert launch[11] == 0


def test_what_a_launch_is_given_are_the_addresses_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int | None, int]] = []

    class Reading(FakeDriver):
        def cuLaunchKernel(self, *arguments: Any) -> tuple[int]:
            pointers = ctypes.cast(arguments[9], ctypes.POINTER(ctypes.c_void_p))
            first = ctypes.cast(pointers[0], ctypes.POINTER(ctypes.c_void_p))[0]
            seen.append((first, ctypes.cast(pointers[1], ctypes.POINTER(ctypes.c_int32))[0]))
            return (0,)

    api = Reading(cuCtxGetCurrent=(1,), cuModuleLoadData=("module",), cuModuleGetFunction=("function",))
    module = _gpu(monkeypatch, api).load(b"image")
    module.launch("avl_merge", (1, 1, 1), 32, 0, [ctypes.c_void_p(2**40), ctypes.c_int32(-7)])
    assert seen == [(2**40, -7)]


def test_a_failed_call_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeDriver(cuCtxGetCurrent=(1,), cuModuleLoadData=("error",))
    with pytest.raises(CudaError, match="cuModuleLoadData failed"):
        _gpu(monkeypatch, api).load(b"not a module")
