"""The TensorRT plugin's ``enqueue`` on real memory: decode steps against float64."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from avl_edge.cuda import FORMATS, KernelShape
from avl_edge.kernels import Part, attend_parts_reference
from avl_edge.layout import UNIT, Format
from avl_edge.pool.formats import decode, encode
from tools.gpu.numerics import SCORES
from tools.gpu.packed import KV_HEADS, Memory, make_memory, wide
from tools.gpu.place import Place, require, row_type
from tools.gpu.report import Skipped

LAYER, LAYERS = 1, 3
SHAPE = KernelShape(128, 4, "Half")
COUNTS = ([1, 40, 333], [25, 64, 2], [3, 1, 90])
"""Rows of each format that three sequences read, new ones among them."""


def check_plugin(place: Place) -> dict[str, float]:
    """One layer of a decode step, over exact rows and over rows of every format: the new rows are in their slots, the
    output and the scores are float64's."""
    if find_spec("avl_edge.trt") is None:
        raise Skipped("this version has no avl_edge.trt")
    trt = import_module("tensorrt") if find_spec("tensorrt") else None
    if trt is None:
        raise Skipped("tensorrt is not installed: on a Jetson it comes with JetPack")
    plugin = _plugin(trt)
    exact, packed = (_check_step(place, trt, plugin, parts) for parts in (1, len(FORMATS)))
    return {**exact, **{f"packed_{name}": error for name, error in packed.items()}}


@dataclass(frozen=True)
class Call:
    """A call of ``parts`` formats: the node's inputs and outputs in its order, and the step as it is looked at after.
    ``slots`` int32 ``[P, B]``."""

    memory: Memory
    inputs: list[Tensor]
    outputs: list[Tensor]
    slots: Tensor

    def parts(self) -> list[Part]:
        """What is read, as it lies in memory now."""
        rows, offsets = (self.inputs[at][LAYER].cpu() for at in (5, 6))
        batch, made = self.slots.shape[1], []
        for part, name in enumerate(list(FORMATS)[: len(self.slots)]):
            own = offsets[part * batch : (part + 1) * batch + 1]
            keys, values = self.memory.keys.cpu(), self.memory.values.cpu()
            if part:
                keys, values = (arena.view(torch.uint8).flatten() for arena in (keys, values))
            made.append(Part(name, keys, values, rows[int(own[0]) : int(own[-1])], own - own[0]))
        return made


def _check_step(place: Place, trt: Any, plugin: Any, parts: int) -> dict[str, float]:
    call = _call(place, parts)
    space = torch.empty(_workspace(plugin, trt, call.inputs), dtype=torch.uint8, device=place.accelerator.device)
    described, results = ([_described(trt, tensor) for tensor in tensors] for tensors in (call.inputs, call.outputs))
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (call.inputs, call.outputs)]
    plugin.on_shape_change(described, results)
    plugin.enqueue(described, results, *addresses, space.data_ptr(), place.accelerator.stream())
    place.accelerator.synchronize()
    require(_is_written(call), "the plugin did not write the new rows into their slots")
    every = [wide(part) for part in call.parts()]
    query, (out, scores, _) = call.inputs[0].cpu(), (output.cpu() for output in call.outputs)
    expected, weights = attend_parts_reference(query.double(), every, KV_HEADS, SHAPE.head_dim**-0.5, scores=True)
    assert weights is not None
    relative = float((out.double() - expected).norm() / expected.norm())
    require(relative <= torch.finfo(out.dtype).eps, f"the plugin's output is {relative:.2e} from float64")
    worst = float((scores.double() - torch.cat(weights)).abs().max())
    require(worst <= SCORES, f"a score of the plugin is {worst:.2e} from float64")
    return {"out_relative": relative, "scores_max": worst}


def _call(place: Place, parts: int) -> Call:
    """The last row of a list of each sequence is that of its new token, each of the next format."""
    device, batch = place.accelerator.device, len(COUNTS[0])
    counts = [own if part < parts else [0] * batch for part, own in enumerate(COUNTS)]
    memory = make_memory(place, SHAPE, counts, seed=parts)
    offsets, rows = memory.offsets[: parts * batch + 1], memory.rows.clone()
    slots = torch.full((parts, batch), -1, dtype=torch.int32, device=device)
    for b in range(batch):
        part = b % parts
        slots[part, b] = rows[int(offsets[part * batch + b + 1]) - 1] = _unread(memory, part)[b]
    generator = torch.Generator().manual_seed(0)
    heads = KV_HEADS * SHAPE.group
    query, key, value = (
        torch.randn(batch, count, SHAPE.head_dim, generator=generator).to(device, row_type(SHAPE))
        for count in (heads, KV_HEADS, KV_HEADS)
    )
    tables = [_of_layers(table) for table in (rows, offsets, slots.flatten())]
    token_offsets = torch.arange(batch + 1, dtype=torch.int32, device=device)
    queries = torch.zeros(1, dtype=torch.int32, device=device)
    words = [arena.view(torch.int32).view(-1, UNIT // 4) for arena in (memory.keys, memory.values)]
    inputs = [query, key, value, memory.keys, memory.values, *tables, token_offsets, queries, *words]
    row_scores = torch.empty(rows.numel(), dtype=torch.float32, device=device)
    token_scores = torch.empty(2, batch, dtype=torch.float32, device=device)
    return Call(memory, inputs, [torch.empty_like(query), row_scores, token_scores], slots)


def _unread(memory: Memory, part: int) -> list[int]:
    """Ids in a part of the memory that no list names."""
    most, units = len(memory.keys) // len(FORMATS), KV_HEADS * SHAPE.head_dim * 2 // UNIT
    ids = (part * most + torch.arange(most)) * (units if part else 1)
    return sorted(set(ids.tolist()) - set(memory.parts[part].rows.tolist()))


def _is_written(call: Call) -> bool:
    """Packed rows as the pool packs them, in their values."""
    right = True
    for part, own in zip(call.parts(), call.slots.cpu(), strict=True):
        for arena, new in ((part.keys, call.inputs[1]), (part.values, call.inputs[2])):
            for slot, row in zip(own[own >= 0].tolist(), new.cpu()[own >= 0], strict=True):
                if part.format == "exact":
                    right &= torch.equal(arena[slot], row)
                    continue
                record = encode(Format(part.format), row[None])
                stored = arena[UNIT * slot :][: record.shape[1]][None]
                right &= torch.equal(*(decode(Format(part.format), each, *row.shape) for each in (stored, record)))
    return right


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
