"""The CUDA kernel that smooths new keys and queries: its source run on the CPU, against torch bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.equipment.emulated_kernels import Kernels, Shape
from tests.equipment.emulated_parts import compiled

SHAPES = {Shape(64, 1, torch.float16): ("exact",), Shape(80, 4, torch.bfloat16): ("exact",)}
POOL = 5


@pytest.fixture(scope="module")
def kernels(shared_folder: Path) -> Callable[[Shape], Kernels]:
    """``kernels(shape)``: compiled for its formats."""
    return compiled(SHAPES, shared_folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_keys_and_queries_are_what_torch_makes_of_them(
    kernels: Callable[[Shape], Kernels], data: st.DataObject
) -> None:
    """At the borders of the type too; a sequence without smoothing keeps its own; rows that nobody names are NaN."""
    shape = data.draw(st.sampled_from(list(SHAPES)), "shape")
    ids = data.draw(st.lists(st.integers(-1, POOL - 1), min_size=1, max_size=4), "smoothing")
    kv_heads, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2**32))
    size = data.draw(st.sampled_from((1e-6, 1e-2, 1.0, 30.0, 6e4)), "size")
    random, batch, heads = torch.Generator().manual_seed(seed), len(ids), kv_heads * shape.group
    center, key = (torch.randn(n, kv_heads, shape.dim, generator=random) * size for n in (POOL, batch))
    scale = torch.rand(POOL, kv_heads, shape.dim, generator=random).clamp(min=2.0**-6)
    query = torch.randn(batch, heads, shape.dim, generator=random) * size
    special = data.draw(st.sampled_from((0.0, -0.0, math.inf, math.nan, torch.finfo(shape.dtype).max)), "special")
    key[0, 0, 1], query[0, -1, 2] = special, special
    center, scale, key, query = (each.to(shape.dtype) for each in (center, scale, key, query))
    used = torch.tensor(ids, dtype=torch.int32)
    unread = torch.ones(POOL, dtype=torch.bool).index_fill(0, used[used >= 0].long(), False)
    center[unread], scale[unread] = math.nan, math.nan
    expected_key, expected_query = key.clone(), query.clone()
    for b, row in enumerate(ids):
        if row >= 0:
            expected_key[b] = (key[b] - center[row]) / scale[row]
            expected_query[b] = query[b] * scale[row].repeat_interleave(shape.group, 0)
    strides = (kv_heads * shape.dim, shape.dim) * 2
    kernels(shape).launch("avl_smooth", (kv_heads, batch), query, key, used, *strides, center, scale)
    for got, expected in ((key, expected_key), (query, expected_query)):
        assert torch.equal(got.isnan(), expected.isnan())
        same = got.view(torch.int16) == expected.view(torch.int16)
        assert (same | expected.isnan()).all()
