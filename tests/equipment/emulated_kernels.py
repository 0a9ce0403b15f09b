"""The CUDA kernels as C++ on the CPU: compiled once per shape and row format, launched with tensors.

`plugins/emulation` runs them with a context for each CUDA thread. Outputs and workspace start as NaN, so that what a
kernel fails to write shows.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from avl_edge.attention.cuda import FORMATS, LOW_RANK, reader
from avl_edge.attention.kernels import Part
from avl_edge.kv.layout import Format
from tests import ROOT

PLUGINS = ROOT / "plugins"
COMPILER = shutil.which("g++") or shutil.which("clang++")
NAMES = {torch.float16: "Half", torch.bfloat16: "Bfloat"}


def compile_emulation(source: str, target: Path, *options: str, plugins: Path = PLUGINS) -> Path:
    """A program or library of `plugins/emulation`, without a warning: built once, whichever process asks first."""
    command = [str(COMPILER), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *options]
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            command += [str(plugins / "emulation" / source), "-o", str(target)]
            built = subprocess.run(command, capture_output=True, text=True)
            assert built.returncode == 0, built.stderr
    return target


@dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for. Two warps to a block where no test needs more: threads are what takes time."""

    dim: int
    group: int
    dtype: torch.dtype
    warps: int = 2

    @property
    def macros(self) -> list[str]:
        return [
            f"-DHEAD_DIM={self.dim}",
            f"-DGROUP={self.group}",
            f"-DROW={NAMES[self.dtype]}",
            f"-DWARPS={self.warps}",
        ]

    @property
    def tile(self) -> int:
        """Rows that a warp takes at once: four loads of each lane."""
        lanes = 1 << (self.dim // 8 - 1).bit_length()
        return 4 * (32 // lanes)

    def library(self, folder: Path, format_: str = "exact") -> Path:
        """The kernels of a row format, or of all low-rank ones."""
        source, options = ("low_rank_driver.cpp", ()) if format_ == LOW_RANK else ("driver.cpp", FORMATS[format_])
        library = folder / f"{self}-{self.warps}-{file_name(format_)}.so"
        return compile_emulation(source, library, "-shared", "-fPIC", *self.macros, *options)

    def load(self, folder: Path, format_: str = "exact") -> ctypes.CDLL:
        return ctypes.CDLL(str(self.library(folder, format_)))

    def __str__(self) -> str:
        return f"d{self.dim}-group{self.group}-{NAMES[self.dtype]}"


SHAPES = (
    Shape(64, 1, torch.float16),
    Shape(80, 4, torch.bfloat16),
    Shape(96, 2, torch.float16),
    Shape(128, 1, torch.bfloat16, warps=4),
    Shape(128, 8, torch.float16),
    Shape(256, 7, torch.bfloat16),
)


def file_name(format_: str) -> str:
    """What a library is called after."""
    return format_.replace("/", "+")


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


@dataclass(frozen=True)
class LowRankPart(Part):
    """Low-rank rows: records in arenas of bytes, in which exact rows lie too.

    ``positions`` int32 ``[total]`` of the listed rows; ``bases`` int32 ``[B, most]``, exact rows; ``angles``
    ``[context, 2, d / 2]``; ``smoothing`` int32 ``[B]``, exact rows.
    """

    positions: Tensor
    bases: Tensor
    angles: Tensor
    smoothing: Tensor | None = None


class Kernels:
    """The kernels of one shape by their row formats, launched as on a GPU, with tensors of the CPU."""

    def __init__(self, shape: Shape, libraries: Mapping[str, ctypes.CDLL]) -> None:
        self.shape, self._libraries = shape, libraries

    def launch(
        self,
        name: str,
        grid: tuple[int, ...],
        *arguments: Tensor | int | ctypes.c_void_p | None,
        backwards: bool = False,
        format_: str | None = None,
    ) -> None:
        """A kernel; without a format one that is the same for all."""
        library = self._libraries[reader(format_)] if format_ else next(iter(self._libraries.values()))
        values = [
            ctypes.c_int32(argument)
            if isinstance(argument, int)
            else argument
            if isinstance(argument, ctypes.c_void_p)
            else ctypes.c_void_p(None if argument is None else argument.data_ptr())
            for argument in arguments
        ]
        addresses = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        x, y, z = (*grid, 1, 1)[:3]
        assert library.avl_launch(name.encode(), x, y, z, int(backwards), addresses) == 0

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        offsets: Tensor,
        splits: int,
        *,
        scores: bool = True,
        backwards: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Over exact rows: out, and the scores of all listed rows."""
        part = Part("exact", keys, values, rows, offsets)
        out, weights = self.attend_parts(query, [part], keys.shape[1], splits, scores=scores, backwards=backwards)
        return out, weights[0] if weights else None

    def attend_parts(
        self,
        query: Tensor,
        parts: Sequence[Part],
        kv_heads: int,
        splits: int,
        *,
        scores: bool = True,
        backwards: bool = False,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Over rows of several formats: out, and each part's scores."""
        (batch, heads, dim), count = query.shape, len(parts)
        rows, begins, ends = lists_of(parts)
        capacity = rows.numel() + 3
        sums, states = unwritten(batch, count * splits, heads, dim), unwritten(batch, count * splits, heads, 2)
        low_rank = any(isinstance(part, LowRankPart) for part in parts)
        logits = unwritten(heads, capacity) if scores or low_rank else None
        out, log_sums = unwritten(batch, heads, dim, dtype=query.dtype), unwritten(batch, heads)
        for number, part in enumerate(parts):
            own = slice(number * batch, (number + 1) * batch)
            inputs = (query, part.keys, part.values, rows, begins[own], ends[own])
            numbers = (capacity, number * splits, count * splits)
            name, lists, ranks, strides = "avl_attend", (), (), strides_of(part)
            if isinstance(part, LowRankPart):
                positions = torch.full((capacity,), 2**30, dtype=torch.int32)
                first = sum(each.rows.numel() for each in parts[:number])
                positions[first : first + part.rows.numel()] = part.positions
                name, form = "avl_attend_low_rank", Format(part.format)
                lists = (positions, part.bases, part.angles, part.smoothing)
                ranks = (part.bases.shape[1], form.read_rank, int(form.packs_coefficients))
                strides = (kv_heads * dim, dim) * 2
            wanted = logits if scores or lists else None
            self.launch(
                name,
                (kv_heads, splits, batch),
                *(*inputs, *lists, *strides, *numbers, *ranks, sums, states, wanted),
                backwards=backwards,
                format_=part.format,
            )
        merge = (-(-heads // self.shape.warps), batch)
        sizes = (heads, splits, count)
        self.launch("avl_merge", merge, sums, states, begins, ends, *sizes, out, log_sums, backwards=backwards)
        if not scores:
            return out, None
        assert logits is not None
        weights = self.scores(logits, log_sums, begins, ends, batch, backwards=backwards)
        assert weights[rows.numel() :].isnan().all(), "written past the last row"
        return out, list(torch.split(weights[: rows.numel()], [part.rows.numel() for part in parts]))

    def scores(
        self, logits: Tensor, log_sums: Tensor, begins: Tensor, ends: Tensor, batch: int, *, backwards: bool = False
    ) -> Tensor:
        heads, capacity = logits.shape
        weights, grid = unwritten(capacity), (2, batch, len(begins) // batch)
        self.launch("avl_scores", grid, logits, log_sums, begins, ends, heads, capacity, weights, backwards=backwards)
        return weights

    def scan(self, query: Tensor, parts: Sequence[Part], kv_heads: int) -> list[Tensor]:
        """The weights of each part's rows by a scan of their keys; a sequence has rows in one part at most."""
        batch, heads, _ = query.shape
        rows, begins, ends = lists_of(parts)
        capacity = rows.numel() + 3
        logits, log_sums = unwritten(heads, capacity), unwritten(batch, heads)
        for number, part in enumerate(parts):
            own = slice(number * batch, (number + 1) * batch)
            strides = strides_of(part)[:2]
            self.launch(
                "avl_scan",
                (kv_heads, 2, batch),
                *(query, part.keys, rows, begins[own], ends[own], *strides, capacity, logits),
                format_=part.format,
            )
        grid = (-(-heads // self.shape.warps), batch, len(parts))
        self.launch("avl_log_sums", grid, logits, begins, ends, heads, capacity, log_sums)
        weights = self.scores(logits, log_sums, begins, ends, batch)
        return list(torch.split(weights[: rows.numel()], [part.rows.numel() for part in parts]))

    def nucleus(self, weights: Sequence[Tensor], limits: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Which of each list's order are picked, by ``weights`` of one part, under (share in 2^-30, most rows)."""
        batch, total = len(weights), sum(map(len, weights))
        every = torch.cat([*weights, unwritten(1)])
        offsets = torch.tensor([0, *accumulate(map(len, weights))], dtype=torch.int32)
        candidates = torch.arange(1000, 1000 + total, dtype=torch.int32)
        # Each list has two rows that were listed, room for all candidates, and one more entry that is nobody's.
        starts = [int(offsets[b]) + 3 * b for b in range(batch)]
        rows = torch.full((total + 3 * batch,), -7, dtype=torch.int32)
        listed = torch.tensor([start + 2 for start in starts], dtype=torch.int32)
        ends, picked = torch.full((batch,), -7, dtype=torch.int32), torch.full((total + 1,), -7, dtype=torch.int8)
        bounds = torch.tensor(limits, dtype=torch.int32)
        self.launch(
            "avl_nucleus", (batch, 1), every, candidates, offsets, offsets[1:], bounds, listed, rows, ends, picked
        )
        assert picked[total] == -7, "written past the last row"
        found = []
        for b, (begin, start) in enumerate(zip(offsets.tolist(), starts, strict=False)):
            flags = picked[begin : begin + len(weights[b])]
            places = flags.nonzero()[:, 0]
            assert set(flags.tolist()) <= {0, 1}
            assert rows[start + 2 : int(ends[b])].tolist() == (1000 + begin + places).tolist()
            assert set(rows[int(ends[b]) : start + 3 + len(weights[b])].tolist()) == {-7}
            assert rows[start : start + 2].tolist() == [-7, -7]
            found.append(places.tolist())
        return found

    def prompt_scores(self, query: Tensor, keys: Tensor, positions: Tensor, summed: int, total: Tensor) -> Tensor:
        """Query [H, w, d] of the last w tokens, keys [H_kv, n, d], of any strides; adds to `total`, returns `last`."""
        (heads, w, _), n = query.shape, keys.shape[1]
        first = ctypes.c_void_p(query.data_ptr() - (n - w) * query.stride(1) * query.itemsize)
        queries = positions.numel()
        logits, log_sums, last = unwritten(queries, heads, n), unwritten(queries, heads), unwritten(n)
        strides = (query.stride(1), query.stride(0), keys.stride(1), keys.stride(0))
        self.launch("avl_prompt_logits", (keys.shape[0], 2), first, keys, positions, n, queries, *strides, logits)
        self.launch(
            "avl_prompt_log_sums", (-(-queries * heads // self.shape.warps),), logits, n, queries * heads, log_sums
        )
        self.launch("avl_prompt_scores", (-(-n // 32),), logits, log_sums, n, heads, queries, summed, last, total)
        return last


def lists_of(parts: Sequence[Part]) -> tuple[Tensor, Tensor, Tensor]:
    """All parts' rows in one list, and where each sequence's begin and end in it."""
    rows = torch.cat([part.rows for part in parts])
    before = accumulate((part.rows.numel() for part in parts), initial=0)
    offsets = [part.offsets + skipped for part, skipped in zip(parts, before, strict=False)]
    return rows, torch.cat([each[:-1] for each in offsets]), torch.cat([each[1:] for each in offsets])


def strides_of(part: Part) -> tuple[int, ...]:
    return (*part.keys.stride()[:2], *part.values.stride()[:2]) if part.format == "exact" else (0, 0, 0, 0)
