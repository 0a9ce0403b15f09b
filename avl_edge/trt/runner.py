"""The decoder's engine at run time: opened from a package, bound to given device memory, one step held in a CUDA graph.

    with open_package(out, fingerprint) as package:
        decoder = Decoder.open(package, bindings, stream)
    decoder.take_memory(address)                  # decoder.memory_bytes of device memory, 256-byte aligned
    decoder.prompt(dims, addresses)               # one prompt
    replay = decoder.capture(dims, addresses)     # a step, run once and recorded
    replay()                                      # the step again, over what its buffers hold by then

``dims`` gives the varying dimensions of the decoder's table of bindings in `avl_edge.export` ("T", "F", "B + 1", "N",
"R", "W", and where tokens are pruned "survivors"), ``addresses`` a device address for every input and output by name.
Calls queue work on the decoder's stream and return; nothing is allocated.

Prompts and steps have an execution context each, so that a recorded step outlives the prompts between its replays. Both
work in the same memory, as one stream lets them run only one after the other.

None of this has run on a GPU: tests play TensorRT and the driver by stand-ins that hold the calls to their rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..engine import DECODER_ENGINE, PROMPT, STEP, Package, find_tensorrt
from ..errors import AvlEdgeError, BadInput
from ..export import Bindings
from ..optional import optional
from .plugin import register

_SURVIVORS = "survivors"


class EngineFailed(AvlEdgeError):
    """TensorRT or CUDA refused a call; the message ends with its reason."""


class Decoder:
    """One engine with its two contexts; see the module's text."""

    def __init__(self, trt: Any, engine: Any, bindings: Bindings, stream: int) -> None:
        """``engine``: an ``ICudaEngine`` with the profiles of :func:`avl_edge.engine.decoder_profiles`; ``stream``: a
        ``cudaStream_t`` as an int, not the default one, which cannot be captured."""
        self._bindings, self._stream, self._engine = bindings, stream, engine
        self._kept: tuple[Any, ...] = ()  # what an engine needs as long as it lives
        self._require_same(bindings)
        self.memory_bytes = int(engine.device_memory_size_v2)
        self._contexts = {profile: self._context(trt, profile) for profile in (PROMPT, STEP)}
        self._survivors = {profile: np.zeros(1, np.int64) for profile in (PROMPT, STEP)}

    @classmethod
    def open(cls, package: Package, bindings: Bindings, stream: int) -> Decoder:
        """The decoder of a package that was opened for this machine; reads the whole engine into device memory.

        Raises :class:`BadInput` without TensorRT, :class:`~avl_edge.engine.BadPackage` for a package without the
        engine, :class:`EngineFailed` where TensorRT does not take it.
        """
        path = package[DECODER_ENGINE]
        trt = find_tensorrt()
        if trt is None:
            raise BadInput("running an engine needs TensorRT, which comes with JetPack: apt install python3-libnvinfer")
        register(trt)
        logger = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineFailed(f"TensorRT does not take {path}: build the package again on this device")
        decoder = cls(trt, engine, bindings, stream)
        decoder._kept = (runtime, logger)
        return decoder

    def take_memory(self, address: int) -> None:
        """Work in :attr:`memory_bytes` of device memory at ``address``, which both contexts share."""
        for context in self._contexts.values():
            context.set_device_memory(address, self.memory_bytes)

    def prompt(self, dims: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        """Queue a prompt: one sequence of ``dims["T"]`` tokens."""
        self._run(PROMPT, dims, addresses)

    def step(self, dims: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        """Queue a decode step: T = B new tokens."""
        self._run(STEP, dims, addresses)

    def capture(self, dims: Mapping[str, int], addresses: Mapping[str, int]) -> Callable[[], None]:
        """Run a step, record it, and give what queues it again.

        A replay reads ids, offsets and slots from where they lay: the caller changes their content, never their size or
        place. The step runs once before it is recorded, as TensorRT settles a new shape in its first run; that writes
        the new rows, and is as good as the replay that it saves. A later step of other ``dims`` or ``addresses`` leaves
        the recording as it is.
        """
        self._run(STEP, dims, addresses)
        api = optional("cuda.bindings.driver", "a recorded step", "cuda")
        mode = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        stream = api.CUstream(self._stream)
        _call(api, "cuStreamBeginCapture", stream, mode)
        try:
            self._execute(STEP)
        finally:  # a stream that is left capturing refuses all other work
            (graph,) = _call(api, "cuStreamEndCapture", stream)
        (recorded,) = _call(api, "cuGraphInstantiate", graph, 0)
        _call(api, "cuGraphDestroy", graph)

        def replay() -> None:
            _call(api, "cuGraphLaunch", recorded, stream)

        return replay

    def _run(self, profile: int, dims: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        self._bind(profile, dims, addresses)
        self._execute(profile)

    def _bind(self, profile: int, dims: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        context = self._contexts[profile]
        for binding in (*self._bindings.inputs, *self._bindings.outputs):
            if binding.name not in addresses and binding.name != _SURVIVORS:
                raise BadInput(f"the decoder needs the address of {binding.name}")
        for binding in self._bindings.inputs:
            if binding.name == _SURVIVORS:  # a size, which TensorRT reads on the host
                self._survivors[profile][0] = dims[_SURVIVORS]
                _require(context.set_tensor_address(binding.name, self._survivors[profile].ctypes.data), binding.name)
                continue
            shape = tuple(dim if isinstance(dim, int) else dims[dim] for dim in binding.shape)
            _require(context.set_input_shape(binding.name, shape), f"{binding.name} of shape {list(shape)}")
            _require(context.set_tensor_address(binding.name, addresses[binding.name]), binding.name)
        for binding in self._bindings.outputs:
            _require(context.set_tensor_address(binding.name, addresses[binding.name]), binding.name)
        if missing := context.infer_shapes():
            raise EngineFailed(f"TensorRT cannot tell the shapes of the decoder without {', '.join(missing)}")

    def _execute(self, profile: int) -> None:
        _require(self._contexts[profile].execute_async_v3(self._stream), "the decoder's run")

    def _context(self, trt: Any, profile: int) -> Any:
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        _require(context is not None, "an execution context")
        _require(context.set_optimization_profile_async(profile, self._stream), f"profile {profile}")
        return context

    def _require_same(self, bindings: Bindings) -> None:
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        wanted = {binding.name for binding in (*bindings.inputs, *bindings.outputs)}
        if names != wanted:
            other = ", ".join(sorted(names ^ wanted)[:3])
            raise EngineFailed(f"the engine has other inputs and outputs ({other}): build the package again")


def _require(taken: bool, what: str) -> None:
    if not taken:
        raise EngineFailed(f"TensorRT does not take {what}: the engine was built for other sizes")


def _call(api: Any, name: str, *arguments: object) -> tuple[Any, ...]:
    status, *results = getattr(api, name)(*arguments)
    if status != api.CUresult.CUDA_SUCCESS:
        raise EngineFailed(f"{name} failed: {getattr(status, 'name', status)}")
    return tuple(results)
