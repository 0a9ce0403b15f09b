"""The TensorRT plugin through the real Python bindings of TensorRT, its kernels on the CPU.

    python -m tests.equipment.trt_on_cpu CASES.pt KERNELS_FOLDER

runs with a `tensorrt_bindings` on the path, in a process of its own: there is one version of it in a process.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avl_edge.backends.tensorrt.attention import Attention
from avl_edge.package.export.core_attention import INPUTS
from tests.equipment.trt_calls import STREAM, Call, Placed, Shape

_KEPT: list[Any] = []


def _fields(trt: Any, layer: Tensor | None) -> Any:
    """As TensorRT's parser makes them of an attribute. They hold addresses: what those name is kept."""
    import numpy as np

    if layer is None:
        return trt.PluginFieldCollection([])
    data = np.array([int(layer)], dtype=np.int32)
    field = trt.PluginField("layer", data, trt.PluginFieldType.INT32)
    _KEPT.extend((data, field))
    return trt.PluginFieldCollection([field])


def _descriptions(trt: Any, tensors: Sequence[Tensor], dynamic: bool) -> list[Any]:
    types = {
        torch.float16: trt.DataType.HALF,
        torch.bfloat16: trt.DataType.BF16,
        torch.float32: trt.DataType.FLOAT,
        torch.int32: trt.DataType.INT32,
    }
    made = []
    for tensor in tensors:
        description = trt.PluginTensorDesc()
        description.dims, description.type = trt.Dims(list(tensor.shape)), types[tensor.dtype]
        description.format = trt.TensorFormat.LINEAR
        if dynamic:
            outer = trt.DynamicPluginTensorDesc()
            outer.desc, outer.max = description, trt.Dims(list(tensor.shape))
            outer.min = outer.opt = outer.max
            description = outer
        made.append(description)
    return made


def enqueue(trt: Any, creator: Any, call: Call, kernels: list[str]) -> Call:
    """A call through the plugin, in the order in which TensorRT goes: made, serialised, made again, attached, run.
    ``kernels``: the names of what is loaded."""
    placed = Placed.of(call)
    inputs, outputs = (_descriptions(trt, tensors, True) for tensors in (placed.inputs, placed.outputs))
    built = creator.create_plugin("built", _fields(trt, call["layer"]), trt.TensorRTPhase.BUILD).clone()
    together = [*inputs, *outputs]
    assert all(built.supports_format_combination(at, together, len(inputs)) for at in range(len(together)))
    types = built.get_output_data_types([tensor.desc.type for tensor in inputs])
    assert types == [tensor.desc.type for tensor in outputs]
    built.configure_plugin(inputs, outputs)
    size = built.get_workspace_size(inputs, outputs)
    opened = creator.create_plugin("opened", built.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    running = opened.attach_to_context(None)
    inputs, outputs = (_descriptions(trt, tensors, False) for tensors in (placed.inputs, placed.outputs))
    running.on_shape_change(inputs, outputs)
    running.set_tactic(0)
    ready = list(kernels)
    workspace = placed.memory.unwritten(size, dtype=torch.uint8)
    # The builder takes times with whatever its inputs hold: nothing may follow from that.
    built.enqueue(inputs, outputs, *placed.addresses, workspace.data_ptr(), STREAM)
    assert bool((placed.outputs[1].view(torch.int32) == -1).all())
    running.enqueue(inputs, outputs, *placed.addresses, workspace.data_ptr(), STREAM)
    assert kernels == ready, "what is captured has to be loaded before"
    return placed.results()


NAMES = (
    "Builder.build_serialized_network",
    "Builder.create_builder_config",
    "Builder.create_network",
    "Builder.create_optimization_profile",
    "ExecutionContextAllocationStrategy.USER_MANAGED",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.progress_monitor",
    "IBuilderConfig.set_memory_pool_limit",
    "IBuilderConfig.set_timing_cache",
    "ICudaEngine.create_execution_context",
    "ICudaEngine.device_memory_size_v2",
    "ICudaEngine.get_tensor_location",
    "ICudaEngine.get_tensor_name",
    "ICudaEngine.num_io_tensors",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.infer_shapes",
    "IExecutionContext.set_device_memory",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_optimization_profile_async",
    "IExecutionContext.set_tensor_address",
    "IHostMemory",
    "ILogger.Severity.ERROR",
    "INetworkDefinition.add_plugin_v3",
    "IOptimizationProfile.set_shape",
    "IOptimizationProfile.set_shape_input",
    "IProgressMonitor",
    "ITensor.is_shape_tensor",
    "MemoryPoolType.WORKSPACE",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.parse_from_file",
    "Runtime.deserialize_cuda_engine",
    "TensorLocation.HOST",
)
"""What building and running call, beside the plugin: no object of theirs can be made without TensorRT's libraries."""


def _has(trt: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(trt, part):
            return False
        trt = getattr(trt, part)
    return True


class Expressions:
    """In the place of an IExprBuilder, whose expressions only a network has."""

    def constant(self, value: int) -> int:
        return value


def outlives(trt: Any, creator: Any, call: Call) -> bool:
    """Whether a plugin that Python lets go of stays, as TensorRT may still hold it."""
    plugin = weakref.ref(creator.create_plugin("gone", _fields(trt, call["layer"]), trt.TensorRTPhase.RUNTIME))
    gc.collect()
    return plugin() is not None


def describe(trt: Any, creator: Any, call: Call) -> dict[str, Any]:
    """What the plugin says of itself."""
    plugin = creator.create_plugin("one", _fields(trt, call["layer"]), trt.TensorRTPhase.BUILD)
    placed = Placed.of(call)
    wrong = {}
    together = _descriptions(trt, [*placed.inputs, *placed.outputs], True)
    for at, tensor in enumerate(together):
        right = (tensor.desc.type, tensor.desc.format)
        for change in ((trt.DataType.INT8, right[1]), (right[0], trt.TensorFormat.CHW2)):
            tensor.desc.type, tensor.desc.format = change
            wrong[f"{at} {change}"] = plugin.supports_format_combination(at, together, len(placed.inputs))
        tensor.desc.type, tensor.desc.format = right
    none = trt.DimsExprs([None, None, None])
    real = plugin.get_output_shapes([none] * len(placed.inputs), [], type("", (), {"constant": lambda *_: None})())
    kept, trt.DimsExprs = trt.DimsExprs, list
    symbols = plugin.get_output_shapes([[f"{name}{at}" for at in range(3)] for name in INPUTS], [], Expressions())
    trt.DimsExprs = kept
    refusals = []
    for attempt in (
        lambda: creator.create_plugin("none", _fields(trt, None), trt.TensorRTPhase.BUILD),
        lambda: creator.create_plugin("far", _fields(trt, torch.tensor(3)), trt.TensorRTPhase.BUILD).configure_plugin(
            together[: len(placed.inputs)], together[len(placed.inputs) :]
        ),
    ):
        try:
            attempt()
            refusals.append("")
        except Exception as error:
            refusals.append(f"{type(error).__name__}: {error}")
    return {
        "version": trt.__version__,
        "creator": [creator.name, creator.plugin_version, creator.plugin_namespace],
        "attributes": [[field.name, str(field.type)] for field in creator.field_names],
        "plugin": [plugin.plugin_name, plugin.plugin_version, plugin.plugin_namespace, plugin.num_outputs],
        "capabilities": [
            plugin.get_capability_interface(getattr(trt.PluginCapabilityType, kind)) is plugin
            for kind in ("CORE", "BUILD", "RUNTIME")
        ],
        "tactics": plugin.get_valid_tactics(),
        "wrong": [name for name, taken in wrong.items() if taken],
        "ranks": [len(shape) for shape in real],
        "symbols": symbols,
        "outlives": outlives(trt, creator, call),
        "missing": [name for name in NAMES if not _has(trt, name)],
        "refusals": refusals,
    }


def main() -> None:
    import tensorrt_bindings as trt

    from avl_edge.backends.tensorrt.plugin import PluginMissing, make_creator, register

    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    cases: list[tuple[Shape, Call]] = torch.load(path, weights_only=False)
    loaded: list[list[int | str]] = []
    kernels: list[str] = []

    def load(head_dim: int, group: int, dtype: str) -> Attention:
        loaded.append([head_dim, group, dtype])
        return Shape(head_dim, group, dtype).attention(folder, log=kernels)

    creator = make_creator(trt, load)
    torch.save([enqueue(trt, creator, call, kernels) for _, call in cases], path.with_suffix(".out"))
    report = {
        **describe(trt, creator, cases[0][1]),
        "loaded": loaded,
        "packed": sorted({"int8", "int4", "packed tokens"} & set(kernels)),
    }
    try:
        register(trt, load)
    except PluginMissing as error:
        report["registry"] = str(error)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
