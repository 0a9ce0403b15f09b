"""Engines without TensorRT: the exported graphs, run by ONNX Runtime, over the same addresses.

The graphs' bodies leave the pool as it is; what the plugin writes into it, a decode step's new rows, is written here,
from the graph's own keys and values.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch

from avl_edge import Options, Result, Runtime
from avl_edge.attention.cuda import FORMATS
from avl_edge.backends.tensorrt.kernels import digest
from avl_edge.config import KvShape
from avl_edge.kv.formats import encode
from avl_edge.kv.layout import UNIT, Format
from avl_edge.package.engine import DECODER_ENGINE, STEP, Job, Plugin, Recipe, build
from avl_edge.package.export import DECODER, VISION, Binding, Bindings
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.cuda_on_cpu import HostDevice

Array = npt.NDArray[Any]
STREAM = HostDevice().stream()
PROMPT = "What is shown in this picture, and where?"
SECOND = "Name it."
PRUNE_AFTER = 1
RECIPE = Recipe(prune_after=PRUNE_AFTER, images=2, prompt_tokens=200, sequences=4, pool_rows=8192)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and TensorRT, as far as building and opening go."""
    monkeypatch.setattr("avl_edge.package.engine.job.find_tensorrt", lambda: "trt")
    monkeypatch.setattr("avl_edge.package.engine.job.build_engine", lambda *_: (b"an engine", b"its times"))
    monkeypatch.setattr("avl_edge.backends.tensorrt.target.CudaDevice", HostDevice)
    monkeypatch.setattr("avl_edge.backends.tensorrt.target.Engine", GraphRunner)


class Packages:
    """``packages(name, recipe, dtype)``: a random checkpoint as a package in a folder; gives its directory."""

    def __init__(self, checkpoint: Checkpoints, folder: Path) -> None:
        self._checkpoint, self._folder = checkpoint, folder

    def __call__(
        self, name: str = "llama-gqa-full", recipe: Recipe = RECIPE, dtype: torch.dtype = torch.float32
    ) -> Path:
        out = self._folder / f"{name}-{recipe.sequences}-{recipe.prune_after}"
        job = Job.of(self._checkpoint(name, dtype=dtype), recipe)
        build(job, out, "1.0", None, Plugin(digest(), lambda _: None))
        return out


def answers(runtime: Runtime, options: Options, prompts: tuple[str, ...] = (PROMPT, SECOND, PROMPT)) -> list[Result]:
    """Those of several requests that run together: about one picture, another, and both."""
    pictures = ([random_image(1, 60)], [random_image(2, 40)], [random_image(1, 60), random_image(2, 40)])
    running = [runtime.generate(images, prompt, options) for images, prompt in zip(pictures, prompts, strict=True)]
    return [generation.result() for generation in running]


class GraphRunner:
    """An :class:`avl_edge.backends.tensorrt.Engine` of ``vision.onnx`` or ``decoder.onnx``."""

    memory_bytes = 4096

    def __init__(self, path: Path, bindings: Bindings) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._bindings = bindings
        self.memory = 0
        self.contexts: list[int] = []
        """The profile of each."""
        self.runs: list[tuple[int, dict[str, int]]] = []

    @classmethod
    def open(cls, path: Path, bindings: Bindings) -> GraphRunner:
        """In the place of :meth:`avl_edge.backends.tensorrt.Engine.open`: the graph beside the engine's file."""
        graph = DECODER if path.name == DECODER_ENGINE else VISION
        return cls(path.with_name(graph), bindings)

    def take_memory(self, address: int) -> None:
        self.memory = address

    def context(self, profile: int, stream: int) -> GraphContext:
        assert stream == STREAM
        assert self.memory, "it has no memory to work in"
        self.contexts.append(profile)
        return GraphContext(self, profile)

    def run(self, profile: int, dims: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        self.runs.append((profile, dict(dims)))
        inputs = {each.name: self._input(each, dims, addresses) for each in self._bindings.inputs}
        names = [each.name for each in self._bindings.outputs]
        outputs = dict(zip(names, self._session.run(names, inputs), strict=True))
        for each in self._bindings.outputs:
            if dims.get("W") == 0 and "scores" in each.name:
                continue  # nobody looks at them
            _at(addresses[each.name], each, dims)[...] = outputs[each.name]
        if "slots" in inputs:
            self.write_rows(inputs, outputs, dims, addresses)

    def _input(self, binding: Binding, dims: Mapping[str, int], addresses: Mapping[str, int]) -> Array:
        if binding.name == "survivors":
            assert binding.name not in addresses, "a size is read on the host"
            return np.array([dims["survivors"]], dtype=np.int64)
        memory = _at(addresses[binding.name], binding, dims)
        return memory if binding.name.startswith("pool_") else memory.copy()

    def write_rows(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], dims: Mapping[str, int], at: Mapping[str, int]
    ) -> None:
        pools = {each.name: each for each in self._bindings.inputs if each.name.startswith("pool_")}
        for layer, slots in enumerate(inputs["slots"]):
            for name, own in zip(FORMATS, slots.reshape(-1, dims["T"]), strict=False):
                written = np.flatnonzero(own >= 0)
                for kind in ("key", "value"):
                    new = outputs[f"{kind}.{layer}"][written]
                    if kind == "key" and "smoothing" in inputs:
                        new = _smoothed(new, inputs["smoothing"][layer, written], inputs)
                    if name == "exact":
                        _at(at[f"pool_{kind}s"], pools[f"pool_{kind}s"], dims)[own[written]] = new
                        continue
                    # Both arenas are one memory, from the words of the keys on.
                    words = _at(at["pool_key_words"], pools["pool_key_words"], {**dims, "U": 2 * dims["U"]})
                    form, first = Format(name), 0
                    if kind == "value":
                        shape = KvShape(1, *new.shape[1:], 2)
                        first = form.keys.record_bytes(shape) // UNIT if form.is_mixed else dims["U"]
                    side = form.keys if kind == "key" else form.values
                    records = encode(side, torch.from_numpy(new)).numpy().view(np.int32)
                    for slot, record in zip(own[written] + first, records, strict=True):
                        words[slot : slot + len(record) // 4] = record.reshape(-1, 4)


class GraphContext:
    """An :class:`avl_edge.backends.tensorrt.Context`; one of steps takes one set of shapes and addresses for its life,
    as a recording of it holds."""

    def __init__(self, runner: GraphRunner, profile: int) -> None:
        self._runner, self._profile = runner, profile
        self._bound: tuple[Mapping[str, int], Mapping[str, int]] | None = None

    def run(self, dims: Mapping[str, int], addresses: Mapping[str, int], stream: int) -> None:
        assert stream == STREAM
        if self._profile == STEP:
            assert self._bound in (None, (dims, addresses)), "what was recorded is bound otherwise"
        self._bound = dict(dims), dict(addresses)
        self._runner.run(self._profile, dims, addresses)


def _smoothed(keys: Array, ids: Array, inputs: Mapping[str, Array]) -> Array:
    """What the graph gives its attention in the place of ``keys`` ``[n, H_kv, d]``, by the smoothing rows ``[n]``."""
    has_one = (ids >= 0)[:, None, None]
    center = np.where(has_one, inputs["pool_keys"][ids], keys.dtype.type(0))
    scale = np.where(has_one, inputs["pool_values"][ids], keys.dtype.type(1))
    smoothed: Array = (keys - center) / scale
    return smoothed


def _at(address: int, binding: Binding, dims: Mapping[str, int]) -> Array:
    """The memory behind an address as an array of the binding's shape."""
    shape, dtype = binding.shape_at(dims), np.dtype(binding.dtype)
    assert address, f"{binding.name} has no address"
    memory = (ctypes.c_char * max(1, math.prod(shape) * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype=dtype, count=math.prod(shape)).reshape(shape)
