"""An engine at run time: opened from a package, bound to given device memory, run on a stream.

    with open_package(out, fingerprint) as package:
        decoder = Engine.open(package[DECODER_ENGINE], decoder_bindings(...))
    decoder.take_memory(address)                 # decoder.memory_bytes of device memory, 256-byte aligned
    prompts = decoder.context(PROMPT, stream)
    prompts.run(dims, addresses, stream)         # one prompt
    step = decoder.context(STEP, stream)
    step.run(dims, addresses, stream)            # one step, which a CUDA graph can record

``dims`` gives the varying dimensions of the graph's table of bindings in `avl_edge.package.export` ("T", "F", "B + 1",
"N", "R", "W", and where tokens are pruned "survivors"), ``addresses`` a device address for every input and output by
name, a multiple of 256; also one without elements has an address of its own. A run queues work and returns; nothing is
allocated. What is recorded reads ids, offsets and slots from where they lay: for a replay the caller changes their
content, never their size or place. TensorRT settles a new shape in its first run, which must not be the recorded one.

A recording holds on to the state of the context that it was taken from: each has a context of its own, which is given
other shapes and addresses only when the recording is gone. All contexts of all engines may work in the same memory, as
long as one runs at a time.

None of this has run on a GPU: tests play TensorRT by stand-ins that hold the calls to their rules.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import AvlEdgeError, BadInput
from ...package.engine import find_tensorrt, make_logger, reason
from ...package.export import Bindings
from .plugin import register

_SURVIVORS = "survivors"


class EngineFailed(AvlEdgeError):
    """TensorRT refused a call; the message ends with its reason."""


class Engine:
    """One engine, and the memory that its contexts work in; see the module's text."""

    def __init__(self, trt: Any, engine: Any, bindings: Bindings, words: Collection[str] = ()) -> None:
        """``engine``: an ``ICudaEngine`` of a graph with these ``bindings``; ``words``: what its logger kept."""
        self._trt, self._engine, self._bindings, self._words = trt, engine, bindings, words
        self._kept: tuple[Any, ...] = ()  # what an engine needs as long as it lives
        self._require_same(bindings)
        self.memory_bytes = int(engine.device_memory_size_v2)
        """Enough for any of its profiles."""
        self._memory: int | None = None
        self._idle: dict[int, list[Any]] = {}

    @classmethod
    def open(cls, path: Path, bindings: Bindings) -> Engine:
        """The engine in a file of a package that was opened for this machine, copied into device memory.

        Raises :class:`BadInput` without TensorRT, and :class:`EngineFailed` where TensorRT does not take it.
        """
        trt = find_tensorrt()
        if trt is None:
            raise BadInput("running an engine needs TensorRT, which comes with JetPack: apt install python3-libnvinfer")
        register(trt)
        words: deque[str] = deque(maxlen=3)
        logger = make_logger(trt, words)
        runtime = trt.Runtime(logger)
        # Mapped, not read: where CPU and GPU share their memory there is no room for all weights twice.
        with path.open("rb") as file:
            engine = runtime.deserialize_cuda_engine(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if engine is None:
            raise EngineFailed(f"TensorRT does not take {path}: build the package again on this device{_said(words)}")
        opened = cls(trt, engine, bindings, words)
        opened._kept = (runtime, logger)
        return opened

    def take_memory(self, address: int) -> None:
        """Work in :attr:`memory_bytes` of device memory at ``address``; before the first context is asked for."""
        self._memory = address

    def context(self, profile: int, stream: int) -> Context:
        """A context for runs of the profile with that number, set up on ``stream``, a ``cudaStream_t`` as an int; what
        it holds on the device serves the next one when it is let go."""
        idle = self._idle.setdefault(profile, [])
        made = idle.pop() if idle else self._make(profile, stream)
        context = Context(made, self._bindings, self._words)
        weakref.finalize(context, idle.append, made).atexit = False
        return context

    def _make(self, profile: int, stream: int) -> Any:
        assert self._memory is not None, "contexts work in memory that is theirs from the beginning"
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        made = context is not None and context.set_optimization_profile_async(profile, stream)
        _require(made, "TensorRT cannot make a context: free some memory, or build the package again", self._words)
        context.set_device_memory(self._memory, self.memory_bytes)
        return context

    def _require_same(self, bindings: Bindings) -> None:
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        wanted = {binding.name for binding in (*bindings.inputs, *bindings.outputs)}
        if names != wanted:
            other = ", ".join(sorted(names ^ wanted)[:3])
            raise EngineFailed(f"the engine has other inputs and outputs ({other}): build the package again")
        host = self._trt.TensorLocation.HOST
        on_host = {name for name in names if self._engine.get_tensor_location(name) == host}
        if on_host != wanted & {_SURVIVORS}:
            raise EngineFailed(
                f"TensorRT reads {', '.join(sorted(on_host)) or 'no input'} on the host, and should "
                f"{_SURVIVORS} alone: build the package with prune_after never"
            )


class Context:
    """Where an engine runs with one set of shapes and addresses after the other."""

    def __init__(self, context: Any, bindings: Bindings, words: Collection[str]) -> None:
        """``context``: an ``IExecutionContext`` with a profile and memory, which nobody else uses."""
        self._context, self._bindings, self._words = context, bindings, words
        self._bound: tuple[Mapping[str, int], Mapping[str, int]] | None = None
        self._survivors = np.zeros(1, np.int64)

    def run(self, dims: Mapping[str, int], addresses: Mapping[str, int], stream: int) -> None:
        """Queue a run. One with the shapes and addresses of the last one does nothing else, as a recording wants it."""
        if self._bound != (dims, addresses):
            self._bound = None
            self._bind(dims, addresses)
            self._bound = dict(dims), dict(addresses)
        ran = self._context.execute_async_v3(stream)
        _require(ran, "TensorRT cannot run the engine: build the package again", self._words)

    def _bind(self, dims: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        for binding in (*self._bindings.inputs, *self._bindings.outputs):
            if binding.name not in addresses and binding.name != _SURVIVORS:
                raise BadInput(f"the engine needs the address of {binding.name}")
        for binding in self._bindings.inputs:
            if binding.name == _SURVIVORS:  # a size, which TensorRT reads on the host
                self._survivors[0] = dims[_SURVIVORS]
                self._place(binding.name, self._survivors.ctypes.data)
                continue
            shape = binding.shape_at(dims)
            message = (
                f"TensorRT does not take {binding.name} of shape {list(shape)}: the engine was built for other sizes"
            )
            _require(self._context.set_input_shape(binding.name, shape), message, self._words)
            self._place(binding.name, addresses[binding.name])
        for binding in self._bindings.outputs:
            self._place(binding.name, addresses[binding.name])
        if missing := self._context.infer_shapes():
            raise EngineFailed(f"TensorRT cannot tell the shapes of the engine without {', '.join(missing)}")

    def _place(self, name: str, address: int) -> None:
        message = f"TensorRT does not take the address {address:#x} of {name}: build the package again"
        _require(self._context.set_tensor_address(name, address), message, self._words)


def _require(holds: bool, message: str, words: Collection[str]) -> None:
    if not holds:
        raise EngineFailed(message + _said(words))


def _said(words: Collection[str]) -> str:
    return f" ({reason(words)})" if words else ""
