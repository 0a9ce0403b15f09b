"""The TensorRT plugin's ``enqueue`` on real memory: decode steps and questions over a shared prefix against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from avl_edge.attention.cuda import FORMATS, KernelShape
from avl_edge.attention.kernels import Part, attend_parts_reference
from avl_edge.kv.formats import decode, encode
from avl_edge.kv.layout import UNIT, Format
from tools.gpu.dut import DeviceUnderTest, require, row_type
from tools.gpu.numerics import SCORES
from tools.gpu.packed import KV_HEADS, Memory, arenas_of, make_memory, wide
from tools.gpu.report import Skipped

LAYER, LAYERS = 1, 3
SHAPE = KernelShape(128, 4, "Half")
COUNTS = ([1, 40, 333], [25, 64, 2], [3, 1, 90], [17, 9, 4])
"""Rows of each format that three sequences read, in a step new ones among them."""
STEP, QUESTIONS = (1, 1, 1), (9, 2, 30)
"""New tokens of each sequence: with a slot in a step; without one in a prompt, and more than a block takes."""
QUERIES = (-1, 0, 0, 2)
"""Whose attention is summed: tokens by their index, one of them twice."""


def check_plugin(dut: DeviceUnderTest) -> dict[str, float]:
    """One layer of a decode step and of prompts that go on from rows, which are exact ones, and of every format: the
    new rows of a step are in their slots, the output and the scores are float64's."""
    if find_spec("avl_edge.backends.tensorrt") is None:
        raise Skipped("this version has no avl_edge.backends.tensorrt")
    trt = import_module("tensorrt") if find_spec("tensorrt") else None
    if trt is None:
        raise Skipped("tensorrt is not installed: on a Jetson it comes with JetPack")
    plugin = _plugin(trt)
    found: dict[str, float] = {}
    for name, counts in (("", STEP), ("prompt_", QUESTIONS)):
        for kind, parts in (("", 1), ("packed_", len(FORMATS))):
            errors = _check_call(dut, trt, plugin, _call(dut, parts, counts))
            found |= {f"{name}{kind}{what}": error for what, error in errors.items()}
    return found


@dataclass(frozen=True)
class Call:
    """A call of ``counts`` new tokens a sequence over rows of some formats: the node's inputs and outputs in its order,
    and the call as it is checked after. ``slots`` int32 ``[P, t]``."""

    memory: Memory
    counts: Sequence[int]
    inputs: list[Tensor]
    outputs: list[Tensor]
    slots: Tensor

    def parts(self) -> list[Part]:
        """What is read, as it lies in memory now."""
        rows, offsets = (self.inputs[at][LAYER].cpu() for at in (5, 6))
        batch, made = len(self.counts), []
        for part, name in enumerate(list(FORMATS)[: len(self.slots)]):
            own = offsets[part * batch : (part + 1) * batch + 1]
            keys, values = arenas_of(name, torch.stack([self.memory.keys.cpu(), self.memory.values.cpu()]))
            made.append(Part(name, keys, values, rows[int(own[0]) : int(own[-1])], own - own[0]))
        return made

    def expected(self) -> list[Tensor]:
        """The outputs in float64, one token after the other."""
        query, key, value = (tensor.cpu().double() for tensor in self.inputs[:3])
        parts, homeless = [wide(part) for part in self.parts()], self.slots.cpu().amax(0) < 0
        starts = [0, *accumulate(part.rows.numel() for part in parts)]
        results = [torch.zeros_like(output, device="cpu", dtype=torch.float64) for output in self.outputs]
        for b, (first, count) in enumerate(zip(accumulate(self.counts, initial=0), self.counts, strict=False)):
            lists = [_of_sequence(part, b) for part in parts]
            begins = [at + int(part.offsets[b]) for part, at in zip(parts, starts, strict=False)]
            rows = torch.cat([at + torch.arange(own.rows.numel()) for own, at in zip(lists, begins, strict=True)])
            for t in range(first, first + count):
                tokens = torch.arange(first, t + 1)[homeless[first : t + 1]]
                new = Part("exact", key, value, tokens.int(), torch.tensor([0, len(tokens)], dtype=torch.int32))
                scale = SHAPE.head_dim**-0.5
                out, weights = attend_parts_reference(query[t : t + 1], [*lists, new], KV_HEADS, scale, scores=True)
                assert weights is not None
                results[0][t] = out[0]
                for line, times in enumerate((t == first + count - 1, QUERIES.count(t))):
                    results[1][line, rows] += torch.cat(weights[:-1]) * times
                    results[2][line, tokens] += weights[-1] * times
        return results


def _of_sequence(part: Part, number: int) -> Part:
    begin, end = part.offsets[number : number + 2].tolist()
    offsets = torch.tensor([0, end - begin], dtype=torch.int32)
    return Part(part.format, part.keys, part.values, part.rows[begin:end], offsets)


def _check_call(dut: DeviceUnderTest, trt: Any, plugin: Any, call: Call) -> dict[str, float]:
    space = torch.empty(_workspace(plugin, trt, call.inputs), dtype=torch.uint8, device=dut.accelerator.device)
    described, results = ([_described(trt, tensor) for tensor in tensors] for tensors in (call.inputs, call.outputs))
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (call.inputs, call.outputs)]
    plugin.on_shape_change(described, results)
    plugin.enqueue(described, results, *addresses, space.data_ptr(), dut.accelerator.stream())
    dut.accelerator.synchronize()
    require(_is_written(call), "the plugin did not write the new rows into their slots")
    (out, *scores), (expected, *weights) = [output.cpu() for output in call.outputs], call.expected()
    relative = float((out.double() - expected).norm() / expected.norm())
    require(relative <= torch.finfo(out.dtype).eps, f"the plugin's output is {relative:.2e} from float64")
    worst = max(float((a.double() - b).abs().max()) for a, b in zip(scores, weights, strict=True))
    # A sum is one of as many weights as there are queries.
    require(worst <= len(QUERIES) * SCORES, f"a score of the plugin is {worst:.2e} from float64")
    return {"out_relative": relative, "scores_max": worst}


def _call(dut: DeviceUnderTest, parts: int, counts: Sequence[int]) -> Call:
    """In a step the last row of a list of each sequence is that of its new token, each of the next format."""
    device, batch, tokens = dut.accelerator.device, len(counts), sum(counts)
    listed = [own if part < parts else [0] * batch for part, own in enumerate(COUNTS)]
    memory = make_memory(dut, SHAPE, listed, seed=parts)
    offsets, rows = memory.offsets[: parts * batch + 1], memory.rows.clone()
    slots = torch.full((parts, tokens), -1, dtype=torch.int32, device=device)
    for b in range(batch if counts == STEP else 0):
        part = (parts - 1 - b) % parts
        slots[part, b] = rows[int(offsets[part * batch + b + 1]) - 1] = _unread(memory, part)[b]
    generator = torch.Generator().manual_seed(0)
    heads = KV_HEADS * SHAPE.group
    query, key, value = (
        torch.randn(tokens, count, SHAPE.head_dim, generator=generator).to(device, row_type(SHAPE))
        for count in (heads, KV_HEADS, KV_HEADS)
    )
    tables = [_of_layers(table) for table in (rows, offsets, slots.flatten())]
    token_offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
    queries = torch.tensor(QUERIES, dtype=torch.int32, device=device)
    words = [arena.view(torch.int32).view(-1, UNIT // 4) for arena in (memory.keys, memory.values)]
    inputs = [query, key, value, memory.keys, memory.values, *tables, token_offsets, queries, *words]
    scores = [torch.full((2, count), torch.nan, device=device) for count in (rows.numel(), tokens)]
    return Call(memory, counts, inputs, [torch.full_like(query, torch.nan), *scores], slots)


def _unread(memory: Memory, part: int) -> list[int]:
    """Ids in a part of the memory that no list names."""
    most, units = len(memory.keys) // len(FORMATS), KV_HEADS * SHAPE.head_dim * 2 // UNIT
    ids = (part * most + torch.arange(most)) * (units if part else 1)
    return sorted(set(ids.tolist()) - set(memory.parts[part].rows.tolist()))


def _is_written(call: Call) -> bool:
    """Packed rows as the pool packs them, in their values."""
    right = True
    for part, own in zip(call.parts(), call.slots.cpu(), strict=True):
        form = Format(part.format)
        sides = ((part.keys, form.keys, call.inputs[1]), (part.values, form.values, call.inputs[2]))
        for arena, kind, new in sides:
            for slot, row in zip(own[own >= 0].tolist(), new.cpu()[own >= 0], strict=True):
                if part.format == "exact":
                    right &= torch.equal(arena[slot], row)
                    continue
                record = encode(kind, row[None])
                stored = arena[UNIT * slot :][: record.shape[1]][None]
                right &= torch.equal(*(decode(kind, each, *row.shape) for each in (stored, record)))
    return right


def _of_layers(table: Tensor) -> Tensor:
    """A table of all layers, of which only one holds what may be read."""
    tables = torch.full((LAYERS, *table.shape), -(2**30), dtype=torch.int32, device=table.device)
    tables[LAYER] = table
    return tables


def _plugin(trt: Any) -> Any:
    """The plugin of one layer, from its creator, as the runtime makes it."""
    module = import_module("avl_edge.backends.tensorrt.plugin")
    creator = module.make_creator(trt, import_module("avl_edge.backends.tensorrt.attention").Attention.load)
    fields = [SimpleNamespace(name="layer", data=[LAYER])]
    return creator.create_plugin("", fields, trt.TensorRTPhase.RUNTIME)


def _workspace(plugin: Any, trt: Any, inputs: list[Tensor]) -> int:
    largest = [SimpleNamespace(max=tuple(tensor.shape), desc=_described(trt, tensor)) for tensor in inputs]
    return int(plugin.get_workspace_size(largest, []))


def _described(trt: Any, tensor: Tensor) -> Any:
    types = {torch.float16: trt.DataType.HALF, torch.float32: trt.DataType.FLOAT, torch.int32: trt.DataType.INT32}
    return SimpleNamespace(dims=tuple(tensor.shape), type=types[tensor.dtype], format=trt.TensorFormat.LINEAR)
