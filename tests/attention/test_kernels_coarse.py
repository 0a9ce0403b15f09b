"""A coarse scan of packed keys, against numpy that unpacks records by itself and sums in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_edge.attention.kernels import coarse_weights, coarse_weights_reference
from avl_edge.config import KvShape
from avl_edge.kv.layout import UNIT, Format
from tests.equipment.decode_attention import RELATIVE, needs_native
from tests.equipment.packed_parts import (
    COUNTS,
    DIMS,
    FORMATS,
    HEADS,
    expected_of,
    half_steps,
    logit_error,
    store,
    unpacked,
)

COARSE = [pytest.param(coarse_weights, marks=needs_native), coarse_weights_reference]


@pytest.mark.parametrize("weigh", COARSE)
@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(FORMATS),
    counts=st.lists(COUNTS, max_size=3),
    heads=HEADS,
    dim=st.sampled_from(DIMS),
    dtype=st.sampled_from(list(RELATIVE)),
    seed=st.integers(0, 2**31),
)
def test_coarse_weights_match_float64(
    weigh: Callable[..., Tensor],
    name: str,
    counts: list[int],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    kv_heads, group = heads
    part, query = store(name, counts, kv_heads, dim, dtype).part, torch.randn(len(counts), kv_heads * group, dim)
    weights = weigh(query.to(dtype), part, kv_heads, 0.2)
    keys = unpacked(part, part.keys, kv_heads, dim, coarse=True)
    _, (expected,) = expected_of(query.to(dtype), [keys], [keys], [part.offsets], 0.2)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double().numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weigh", COARSE)
def test_coarse_weights_read_scales_and_high_nibbles_only(weigh: Callable[..., Tensor]) -> None:
    part, query, dim = store("int8", [50, 9], 4, 64).part, torch.randn(2, 8, 64), 64
    weights = weigh(query, part, 4, 0.2)
    keys = part.keys.clone()
    for begin in (part.rows * UNIT).tolist():
        low = begin + Format("int8").record_bytes(KvShape(1, 4, dim, 4)) - 4 * dim // 2
        keys[low : low + 4 * dim // 2] = torch.randint(256, (4 * dim // 2,), dtype=torch.uint8)
    assert not torch.equal(keys, part.keys)
    other = replace(part, keys=keys, values=torch.full_like(part.values, 255))
    assert torch.equal(weights, weigh(query, other, 4, 0.2))
    assert not torch.equal(weights, weigh(2 * query, other, 4, 0.2))


@needs_native
def test_a_coarse_scan_is_within_its_step() -> None:
    """16 values share a high nibble and stand for their middle: at most 8 fine steps away, and half of one more."""
    stored, query = store("int8", [200], 4, 128), 0.05 * torch.randn(1, 8, 128)
    weights = coarse_weights(query, stored.part, 4, 128**-0.5)
    keys = stored.keys.double().numpy()
    _, (expected,) = expected_of(query, [keys], [keys], [stored.part.offsets], 128**-0.5)
    growth = np.exp(2 * logit_error(query[0], 17 * half_steps("int8", stored.keys), 128**-0.5).max()) - 1
    assert growth < 0.5  # or the bound would say nothing
    assert (np.abs(weights.double().numpy() - expected) <= growth * expected + 1e-7).all()


@pytest.mark.parametrize("weigh", COARSE)
def test_coarse_weights_check_ids(weigh: Callable[..., Tensor]) -> None:
    part = store("int8", [3], 4, 64).part
    with pytest.raises(IndexError, match="outside the int8 arena"):
        weigh(torch.randn(1, 4, 64), replace(part, rows=part.rows + len(part.keys) // UNIT), 4, 1.0)
