"""An engine at run time: opened from a package, bound to given device memory, run on a stream.

    with open_package(out, fingerprint) as package:
        decoder = Engine.open(package[DECODER_ENGINE], decoder_bindings(...), profiles=2, stream=stream)
    decoder.take_memory(address)                       # decoder.memory_bytes of device memory, 256-byte aligned
    decoder.run(PROMPT, dims, addresses, stream)       # one prompt
    decoder.run(STEP, dims, addresses, stream)         # one step, which a CUDA graph can record

``dims`` gives the varying dimensions of the graph's table of bindings in `avl_edge.export` ("T", "F", "B + 1", "N",
"R", "W", and where tokens are pruned "survivors"), ``addresses`` a device address for every input and output by name.
A run queues work and returns; nothing is allocated. What is recorded reads ids, offsets and slots from where they lay:
for a replay the caller changes their content, never their size or place. TensorRT settles a new shape in its first run,
which must not be the recorded one.

Prompts and steps have an execution context each, so that a recorded step outlives the prompts between its replays. All
contexts work in the same memory: only one may run at a time.

None of this has run on a GPU: tests play TensorRT by stand-ins that hold the calls to their rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import find_tensorrt
from ..errors import AvlEdgeError, BadInput
from ..export import Bindings
from .plugin import register

_SURVIVORS = "survivors"


class EngineFailed(AvlEdgeError):
    """TensorRT refused a call; the message ends with its reason."""


class Engine:
    """One engine with a context for each of its profiles; see the module's text."""

    def __init__(self, trt: Any, engine: Any, bindings: Bindings, profiles: int, stream: int) -> None:
        """``engine``: an ``ICudaEngine`` of a graph with these ``bindings``; ``stream``: a ``cudaStream_t`` as an int,
        on which its contexts are set up."""
        self._bindings, self._engine = bindings, engine
        self._kept: tuple[Any, ...] = ()  # what an engine needs as long as it lives
        self._require_same(bindings)
        self.memory_bytes = int(engine.device_memory_size_v2)
        self._contexts = [self._context(trt, profile, stream) for profile in range(profiles)]
        self._survivors = np.zeros((profiles, 1), np.int64)

    @classmethod
    def open(cls, path: Path, bindings: Bindings, profiles: int, stream: int) -> Engine:
        """The engine in a file of a package that was opened for this machine; reads it whole into device memory.

        Raises :class:`BadInput` without TensorRT, and :class:`EngineFailed` where TensorRT does not take it.
        """
        trt = find_tensorrt()
        if trt is None:
            raise BadInput("running an engine needs TensorRT, which comes with JetPack: apt install python3-libnvinfer")
        register(trt)
        logger = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineFailed(f"TensorRT does not take {path}: build the package again on this device")
        opened = cls(trt, engine, bindings, profiles, stream)
        opened._kept = (runtime, logger)
        return opened

    def take_memory(self, address: int) -> None:
        """Work in :attr:`memory_bytes` of device memory at ``address``, which all contexts share."""
        for context in self._contexts:
            context.set_device_memory(address, self.memory_bytes)

    def run(self, profile: int, dims: Mapping[str, int], addresses: Mapping[str, int], stream: int) -> None:
        """Queue a run of the profile with that number."""
        context = self._contexts[profile]
        for binding in (*self._bindings.inputs, *self._bindings.outputs):
            if binding.name not in addresses and binding.name != _SURVIVORS:
                raise BadInput(f"the engine needs the address of {binding.name}")
        for binding in self._bindings.inputs:
            if binding.name == _SURVIVORS:  # a size, which TensorRT reads on the host
                self._survivors[profile] = dims[_SURVIVORS]
                _require(context.set_tensor_address(binding.name, self._survivors[profile].ctypes.data), binding.name)
                continue
            shape = binding.shape_at(dims)
            _require(context.set_input_shape(binding.name, shape), f"{binding.name} of shape {list(shape)}")
            _require(context.set_tensor_address(binding.name, addresses[binding.name]), binding.name)
        for binding in self._bindings.outputs:
            _require(context.set_tensor_address(binding.name, addresses[binding.name]), binding.name)
        if missing := context.infer_shapes():
            raise EngineFailed(f"TensorRT cannot tell the shapes of the engine without {', '.join(missing)}")
        _require(context.execute_async_v3(stream), "the engine's run")

    def _context(self, trt: Any, profile: int, stream: int) -> Any:
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        _require(context is not None, "an execution context")
        _require(context.set_optimization_profile_async(profile, stream), f"profile {profile}")
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
