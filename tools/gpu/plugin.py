"""The TensorRT plugin's ``enqueue`` on real memory: a decode step against float64."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from avl_edge.cuda import KernelShape
from tools.gpu.numerics import SCORES, Case, make_case, reference
from tools.gpu.place import Place, require
from tools.gpu.report import Skipped

LAYER, LAYERS = 1, 3


def check_plugin(place: Place) -> dict[str, float]:
    """One layer of a decode step: the new rows are in their slots, the output and the scores are float64's."""
    if find_spec("avl_edge.trt") is None:
        raise Skipped("this version has no avl_edge.trt")
    trt = import_module("tensorrt") if find_spec("tensorrt") else None
    if trt is None:
        raise Skipped("tensorrt is not installed: on a Jetson it comes with JetPack")
    shape, counts = KernelShape(128, 4, "Half"), [1, 40, 333]
    case = make_case(place, shape, counts, pool=400, kv_heads=2, seed=0)
    case.keys.nan_to_num_()
    case.values.nan_to_num_()
    inputs, outputs = _tensors(case)
    plugin = _plugin(trt)
    space = torch.empty(_workspace(plugin, trt, inputs), dtype=torch.uint8, device=place.accelerator.device)
    described = [_described(trt, tensor) for tensor in inputs]
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (inputs, outputs)]
    results = [_described(trt, tensor) for tensor in outputs]
    plugin.on_shape_change(described, results)
    plugin.enqueue(described, results, *addresses, space.data_ptr(), place.accelerator.stream())
    place.accelerator.synchronize()
    slots = inputs[7][LAYER].long()
    written = torch.equal(case.keys[slots], inputs[1]) and torch.equal(case.values[slots], inputs[2])
    require(written, "the plugin did not write the new rows into their slots")
    expected, scores = reference(case)
    relative = float((outputs[0].double() - expected).norm() / expected.norm())
    require(relative <= torch.finfo(outputs[0].dtype).eps, f"the plugin's output is {relative:.2e} from float64")
    worst = float((outputs[1][: len(scores)].double() - scores).abs().max())
    require(worst <= SCORES, f"a score of the plugin is {worst:.2e} from float64")
    return {"out_relative": relative, "scores_max": worst}


def _tensors(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The node's inputs and outputs, in its order; the last row of each list is that of the sequence's new token."""
    device, batch = case.query.device, len(case.query)
    size = (batch, *case.keys.shape[1:])
    key, value = (torch.randn(size, device=device).to(case.keys.dtype) for _ in range(2))
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    case.rows.masked_fill_(case.rows < batch, batch)  # the slots are nobody's but the new tokens'
    case.rows[case.offsets[1:].long() - 1] = slots
    tables = [_of_layers(table) for table in (case.rows, case.offsets, slots)]
    token_offsets = torch.arange(batch + 1, dtype=torch.int32, device=device)
    queries = torch.zeros(1, dtype=torch.int32, device=device)
    inputs = [case.query, key, value, case.keys, case.values, *tables, token_offsets, queries]
    row_scores = torch.empty(case.rows.numel(), dtype=torch.float32, device=device)
    token_scores = torch.empty(2, batch, dtype=torch.float32, device=device)
    return inputs, [torch.empty_like(case.query), row_scores, token_scores]


def _of_layers(table: Tensor) -> Tensor:
    """A table of all layers, of which only one holds what may be read."""
    tables = torch.full((LAYERS, *table.shape), -(2**30), dtype=torch.int32, device=table.device)
    tables[LAYER] = table
    return tables


def _plugin(trt: Any) -> Any:
    """The plugin of one layer, from its creator, as the runtime makes it."""
    module = import_module("avl_edge.trt.plugin")
    creator = module.make_creator(trt, import_module("avl_edge.trt.attention").Attention.load)
    fields = [SimpleNamespace(name="layer", data=[LAYER])]
    return creator.create_plugin("", fields, trt.TensorRTPhase.RUNTIME)


def _workspace(plugin: Any, trt: Any, inputs: list[Tensor]) -> int:
    largest = [SimpleNamespace(max=tuple(tensor.shape), desc=_described(trt, tensor)) for tensor in inputs]
    return int(plugin.get_workspace_size(largest, []))


def _described(trt: Any, tensor: Tensor) -> Any:
    types = {torch.float16: trt.DataType.HALF, torch.float32: trt.DataType.FLOAT, torch.int32: trt.DataType.INT32}
    return SimpleNamespace(dims=tuple(tensor.shape), type=types[tensor.dtype], format=trt.TensorFormat.LINEAR)
