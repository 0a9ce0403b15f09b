"""The TensorRT plugin without a GPU: its kernels as C++ on the CPU, and random calls of it in guarded memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from avl_edge.attention.cuda import FORMATS, Kernels, KernelShape
from avl_edge.attention.cuda.driver import Argument, Grid
from avl_edge.backends.tensorrt.attention import Attention, Sizes
from avl_edge.backends.tensorrt.kernels import PACKED, ROWS, TokenKernels, TokenShape
from avl_edge.config import KvShape
from avl_edge.kv.formats import encode
from avl_edge.kv.layout import UNIT, Format
from avl_edge.package.export.core_attention import INPUTS, OUTPUTS, WORDS
from tests.equipment.emulated_kernels import compile_emulation, file_name

STREAM = 7
GUARD = 64
"""Bytes behind every buffer that nobody may touch."""


@dataclass(frozen=True)
class Shape:
    """What kernels are compiled for. One warp to a block: threads are what takes time."""

    head_dim: int
    group: int
    dtype: str
    warps: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def core(self) -> KernelShape:
        """Of the kernels that write rows, and for 2-byte rows attend in steps."""
        wide = self.dtype == "float32"
        return KernelShape(self.head_dim, 1 if wide else self.group, "Half" if wide else ROWS[self.dtype], self.warps)

    @property
    def tokens(self) -> TokenShape:
        return TokenShape(self.head_dim, self.group, ROWS[self.dtype], self.warps)

    @property
    def formats(self) -> tuple[str, ...]:
        """Of the rows that it reads."""
        return ("exact",) if self.dtype == "float32" else tuple(FORMATS)

    def library(self, folder: Path, kernels: str) -> Path:
        return folder / f"{file_name(kernels)} {self.head_dim}-{self.group}-{self.dtype}-{self.warps}.so"

    def compile(self, folder: Path, *options: str, formats: Sequence[str] = ()) -> None:
        """All libraries, into ``folder``: one for each row format, or some of them, and those of many tokens."""
        formats, options = formats or self.formats, ("-shared", "-fPIC", *options)
        for name in formats:
            macros = (*self.core.options, *FORMATS[name])
            compile_emulation("driver.cpp", self.library(folder, name), *macros, *options)
        for name, more in (("tokens", ()), ("packed tokens", (PACKED,)))[: len(formats)]:
            macros = (*self.tokens.options, *more)
            compile_emulation("token_driver.cpp", self.library(folder, name), *macros, *options)

    def attention(self, folder: Path, *, backwards: bool = False, log: list[str] | None = None) -> Attention:
        """The plugin's own choice of kernels, which run on the CPU; ``log`` takes the names of what is loaded."""

        def load(format_: str) -> EmulatedModule:
            if log is not None:
                log.append(format_)
            return EmulatedModule(self.library(folder, format_), self.core.warps, backwards)

        core = Kernels(load("exact"), self.core, multiprocessors=1, packed=load)
        return Attention(core, TokenKernels(load("tokens"), self.tokens, lambda: load("packed tokens")))


SHAPES = (Shape(16, 2, "float16"), Shape(80, 1, "bfloat16"), Shape(64, 2, "float32"), Shape(136, 3, "float16"))


class EmulatedModule:
    """A source of `plugins/cuda` as a shared library."""

    def __init__(self, library: Path, warps: int, backwards: bool) -> None:
        self._library, self._warps, self._backwards = ctypes.CDLL(str(library)), warps, backwards

    def launch(self, kernel: str, grid: Grid, threads: int, stream: int, arguments: Sequence[Argument]) -> None:
        assert stream == STREAM
        assert threads == 32 * self._warps
        assert min(grid) >= 1, "CUDA refuses an empty grid"
        addresses = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
        assert self._library.avl_launch(kernel.encode(), *grid, int(self._backwards), addresses) == 0, kernel


Call = dict[str, Tensor]
"""The node's inputs by name, but for the pool's words, and `layer`."""
SLOTS = 40
"""Rows that a random call's pool has room for, in each format."""


def inputs_of(call: Call) -> Call:
    """Those of the node, in its order. In calls of 16 bits the pool's arenas are there once more, as words: the same
    memory."""
    given = {name: call[name] for name in INPUTS}
    if call["pool_keys"].dtype == torch.float32:
        return given
    pools = zip(WORDS, (call["pool_keys"], call["pool_values"]), strict=True)
    return given | {name: pool.view(torch.int32).view(-1, 4) for name, pool in pools}


class Arenas:
    """The memory of a pool with room for :data:`SLOTS` rows of each of some formats, where nothing can be read as a
    number yet. The formats lie in random order, so that a row of one may have the id of another's."""

    def __init__(self, shape: Shape, kv_heads: int, parts: int, random: torch.Generator) -> None:
        self._shape, self._kv_heads, self.formats = shape, kv_heads, list(FORMATS)[:parts]
        row = kv_heads * shape.head_dim * shape.torch_dtype.itemsize
        sizes = [row if name == "exact" else self._row_bytes(name) for name in self.formats]
        self._step = [-(-size // row) for size in sizes]
        self._first, self.rows = [0] * parts, 0
        for part in torch.randperm(parts, generator=random).tolist():
            self._first[part], self.rows = self.rows, self.rows + SLOTS * self._step[part]
        self._units = row // UNIT
        memory = torch.full((2, self.rows * row), 255, dtype=torch.uint8)
        self.pool = memory.view(shape.torch_dtype).view(2, self.rows, kv_heads, shape.head_dim)
        self.keys, self.values = self.pool
        self._bytes = memory.flatten()

    def record_bytes(self, form: Format) -> int:
        return form.record_bytes(KvShape(1, self._kv_heads, self._shape.head_dim, 2))

    def _row_bytes(self, name: str) -> int:
        """What a row takes of the arena in which it begins."""
        form = Format(name)
        return self.record_bytes(form.keys) + (self.record_bytes(form.values) if form.is_mixed else 0)

    def id_of(self, part: int, place: int) -> int:
        row = self._first[part] + place * self._step[part]
        return row if part == 0 else row * self._units

    def write(self, part: int, place: int, key: Tensor, value: Tensor) -> None:
        if part == 0:
            self.pool[:, self.id_of(part, place)] = torch.stack([key, value])
            return
        for at, record in records_of(self.formats[part], self.id_of(part, place), key, value, len(self._bytes) // 2):
            self._bytes[at : at + len(record)] = record


def records_of(name: str, row: int, key: Tensor, value: Tensor, arena: int) -> list[tuple[int, Tensor]]:
    """A packed row's two records, of ``[H_kv, d]`` each, and at which byte of the pool they begin: arenas of ``arena``
    bytes, values behind keys."""
    form = Format(name)
    records = encode(form.keys, key[None])[0], encode(form.values, value[None])[0]
    behind = len(records[0]) if form.is_mixed else arena
    return [(UNIT * row, records[0]), (UNIT * row + behind, records[1])]


def make_call(shape: Shape, kind: str, counts: Sequence[int], seed: int, parts: int = 1) -> Call:
    """A random call of ``counts`` new tokens a sequence, in layer 1 of 3, with rows of ``parts`` formats.

    ``kind``: "step", each token with a slot among the rows that its sequence reads; "prompt", none with a slot;
    "mixed", some. What must not be read is NaN: what no list names, or a new token replaces.
    """
    random = torch.Generator().manual_seed(seed)
    layers, kv_heads, tokens, batch = 3, int(torch.randint(1, 3, (), generator=random)), sum(counts), len(counts)

    def below(high: int, *size: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, size, generator=random, dtype=torch.int32)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(shape.torch_dtype)

    slotted = {"step": torch.ones(tokens), "prompt": torch.zeros(tokens), "mixed": below(2, tokens)}[kind].bool()
    part_of = torch.where(slotted, below(parts, tokens), torch.tensor(-1)).tolist()
    arenas = Arenas(shape, kv_heads, parts, random)
    listed = below(24, parts, batch)
    if kind == "prompt" and below(2).item():
        listed[:] = 0
    tables = []
    for _ in range(layers):
        order = [torch.randperm(SLOTS, generator=random).tolist() for _ in range(parts)]
        slots = [[order[part][t] if part_of[t] == part else -1 for t in range(tokens)] for part in range(parts)]
        lists = []
        for part in range(parts):
            for own, first, count in zip(listed[part].tolist(), accumulate(counts, initial=0), counts, strict=False):
                new = [slots[part][t] for t in range(first, first + count) if part_of[t] == part]
                lists.append(below(SLOTS, own).tolist() + new)
        tables.append((slots, lists))
    slots, lists = tables[1]
    for part in range(parts):
        of_part = lists[part * batch : (part + 1) * batch]
        for place in {place for places in of_part for place in places} - set(slots[part]):
            arenas.write(part, place, *normal(2, kv_heads, shape.head_dim))

    def ids(part: int, places: Sequence[int]) -> list[int]:
        return [arenas.id_of(part, place) if place >= 0 else -1 for place in places]

    offsets = [0, *accumulate(len(places) for places in lists)]
    rows = [[row for at, places in enumerate(own) for row in ids(at // batch, places)] for _, own in tables]
    rooms = below(arenas.rows, layers, int(below(4, low=1)))
    call = {
        "query": normal(tokens, kv_heads * shape.group, shape.head_dim) * 2,
        "key": normal(tokens, kv_heads, shape.head_dim),
        "value": normal(tokens, kv_heads, shape.head_dim),
        "pool_keys": arenas.keys,
        "pool_values": arenas.values,
        "rows": torch.cat([torch.tensor(rows, dtype=torch.int32).view(layers, -1), rooms], 1),
        "row_offsets": torch.tensor([offsets] * layers, dtype=torch.int32),
        "slots": torch.tensor([[i for p in range(parts) for i in ids(p, own[p])] for own, _ in tables]).int(),
        "token_offsets": torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        "score_queries": below(tokens, int(below(5)), low=-1),
        "layer": torch.tensor(1),
    }
    # Another layer's tables would give other numbers.
    for table in ("row_offsets", "slots"):
        call[table][0] = 0
    return call


class Memory:
    """Buffers with a guarded end, all of them NaN or given."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, int]] = []

    def place(self, content: Tensor) -> Tensor:
        """``content`` in memory of exactly its size."""
        buffer = self._bytes(content.nbytes)
        tensor = buffer[: content.nbytes].view(content.dtype).view(content.shape)
        return tensor.copy_(content)

    def unwritten(self, *shape: int, dtype: torch.dtype) -> Tensor:
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        return self._bytes(size)[:size].view(dtype).view(shape)

    def _bytes(self, size: int) -> Tensor:
        buffer = torch.full((size + GUARD,), 255, dtype=torch.uint8)
        self._kept.append((buffer, size))
        return buffer

    def check(self) -> None:
        """Nobody wrote past an end."""
        assert all(bool((buffer[size:] == 255).all()) for buffer, size in self._kept), (
            "written past the end of a buffer"
        )


@dataclass
class Placed:
    """A call in memory, as addresses."""

    call: Call
    memory: Memory
    inputs: list[Tensor]
    outputs: list[Tensor]

    @classmethod
    def of(cls, call: Call) -> Placed:
        memory = Memory()
        pool = memory.place(torch.stack([call["pool_keys"], call["pool_values"]]))  # values lie right behind keys
        pools = dict(zip(("pool_keys", "pool_values"), pool, strict=True))
        inputs = inputs_of({name: pools[name] if name in pools else memory.place(call[name]) for name in INPUTS})
        tokens, room = call["query"].shape[0], call["rows"].shape[1]
        outputs = [
            memory.unwritten(*call["query"].shape, dtype=call["query"].dtype),
            memory.unwritten(2, room, dtype=torch.float32),
            memory.unwritten(2, tokens, dtype=torch.float32),
        ]
        return cls(call, memory, list(inputs.values()), outputs)

    @property
    def sizes(self) -> Sizes:
        return Sizes.of([tuple(tensor.shape) for tensor in self.inputs])

    @property
    def addresses(self) -> tuple[list[int], list[int]]:
        return [tensor.data_ptr() for tensor in self.inputs], [tensor.data_ptr() for tensor in self.outputs]

    def results(self) -> Call:
        """The outputs by name, and the pool, after the buffers' ends were checked."""
        self.memory.check()
        pools = {name: tensor for name, tensor in zip(INPUTS, self.inputs, strict=False) if name.startswith("pool")}
        return {**dict(zip(OUTPUTS, self.outputs, strict=True)), **pools}


def run_call(attention: Attention, call: Call) -> Call:
    """The call by :class:`Attention` itself, in exactly as much scratch memory as it asks for."""
    placed = Placed.of(call)
    # What an engine asks for once, for its largest sizes.
    most = replace(placed.sizes, tokens=placed.sizes.tokens + 5, room=placed.sizes.room + 9)
    workspace = placed.memory.unwritten(attention.workspace_bytes(most), dtype=torch.uint8)
    attention.run(placed.sizes, int(call["layer"]), *placed.addresses, workspace.data_ptr(), STREAM)
    return placed.results()
