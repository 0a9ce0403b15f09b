"""What the emulated kernels read, and what float64 makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from avl_edge.attention.kernels import Part, attend_parts_reference
from avl_edge.config import KvShape
from avl_edge.kv.formats import encode
from avl_edge.kv.layout import UNIT, Format
from tests.equipment.emulated_kernels import COMPILER, Kernels, Shape


def compiled(shapes: Mapping[Shape, Sequence[str]], folder: Path) -> Callable[[Shape], Kernels]:
    """Kernels by shape, compiled for its formats where ``folder`` does not have them yet."""
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the emulation with")
    return lambda shape: Kernels(shape, {name: shape.load(folder, name) for name in shapes[shape]})


def record_bytes(name: str, shape: Shape, kv_heads: int) -> int:
    return Format(name).record_bytes(KvShape(1, kv_heads, shape.dim, 2))


def make_part(shape: Shape, name: str, counts: Sequence[int], kv_heads: int, seed: int, pool: int = 30) -> Part:
    """Random selections of ``counts`` rows of a pool, in which nothing else than rows can be read as one: the bytes
    before, between and after records, and rows that nobody selects, are those of a NaN."""
    random = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(pool, kv_heads, shape.dim, generator=random).to(shape.dtype) for _ in range(2))
    chosen = torch.randint(pool, (sum(counts),), generator=random, dtype=torch.int32)
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    unread = torch.ones(pool, dtype=torch.bool)
    unread[chosen.long()] = False
    keys[unread] = values[unread] = math.nan
    if name == "exact":
        return Part(name, keys, values, chosen, offsets)
    form, sections = Format(name), []
    for own, rows in ((form.keys, keys), (form.values, values)):
        records = encode(own, rows)
        records[unread] = 255
        sections.append(records)
    key_bytes = sections[0].shape[1]
    groups = [torch.cat(sections, 1)] if form.is_mixed else sections  # records in one memory, or in two
    step = groups[0].shape[1] // UNIT + 1
    arenas = [torch.full(((pool * step + 1) * UNIT,), 255, dtype=torch.uint8) for _ in groups]
    for arena, records in zip(arenas, groups, strict=True):
        arena[UNIT:].view(pool, step * UNIT)[:, : records.shape[1]] = records
    values_begin = arenas[0][key_bytes:] if form.is_mixed else arenas[1]
    return Part(name, arenas[0], values_begin, chosen * step + 1, offsets)


def make_query(shape: Shape, batch: int, kv_heads: int, seed: int, sharpness: float = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, kv_heads * shape.group, shape.dim, generator=random) * sharpness).to(shape.dtype)


def wide(part: Part) -> Part:
    """For a query in float64."""
    if part.format != "exact":
        return part
    return Part("exact", part.keys.double(), part.values.double(), part.rows, part.offsets)


def check(query: Tensor, parts: Sequence[Part], kv_heads: int, out: Tensor, scores: Sequence[Tensor] | None) -> None:
    """Within 2e-3 of float64 as a whole, and no element further off than its own rounding and float32's."""
    every = [wide(part) for part in parts]
    expected, weights = attend_parts_reference(query.double(), every, kv_heads, query.shape[2] ** -0.5, scores=True)
    assert weights is not None
    assert scores is not None
    limits = torch.finfo(out.dtype)
    error = (out.double() - expected).abs()
    assert error.norm() <= 2e-3 * expected.norm()
    assert (error <= expected.abs() * limits.eps / 2 + limits.smallest_normal * limits.eps + 1e-5).all()
    for got, own in zip(scores, weights, strict=True):
        assert ((got - own).abs() <= 1e-5).all()
