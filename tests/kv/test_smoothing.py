"""Keys as they are smoothed: what attention makes of them, and what a constant in all of them changes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avl_edge.kv.formats import decode, encode
from avl_edge.kv.layout import Format
from avl_edge.kv.smoothing import Smoothing
from avl_edge.model.network.rope import Rope, rotate

DIM, HEADS, GROUP = 32, 2, 3
ROPE = Rope(DIM, {"rope_type": "default", "rope_theta": 10000.0})
_seeds = st.integers(0, 2**31)
_formats = st.sampled_from(["exact", "int8", "int4"])


def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    return ROPE.angles(positions, torch.float64)


def drawn(seed: int, count: int, bias: float) -> tuple[Tensor, Tensor]:
    """Keys ``[count, HEADS, DIM]`` with a ``bias`` before RoPE in one channel of four, and queries ``[5, H, DIM]``."""
    random = torch.Generator().manual_seed(seed)
    biases = bias * torch.randn(HEADS, DIM, generator=random).double() * (torch.arange(DIM) % 4 == 0)
    keys = torch.randn(count, HEADS, DIM, generator=random).double() + biases
    query = torch.randn(5, HEADS * GROUP, DIM, generator=random).double()
    return rotate(keys, *angles(torch.arange(count))), query


def weights(query: Tensor, keys: Tensor) -> Tensor:
    """Softmax ``[5, HEADS, GROUP, n]``."""
    grouped = query.view(len(query), HEADS, GROUP, DIM)
    return (torch.einsum("qhgd,nhd->qhgn", grouped, keys) * DIM**-0.5).softmax(-1)


def through(name: str, keys: Tensor) -> Tensor:
    if name == "exact":
        return keys
    return decode(Format(name), encode(Format(name), keys), HEADS, DIM).double()


def attended(keys: Tensor, query: Tensor, name: str, prompt: int) -> Tensor:
    """Weights over keys that are stored in a format, of a sequence whose first ``prompt`` tokens are the prompt."""
    smoothing = Smoothing.fit(keys[:prompt], torch.arange(prompt), len(keys), angles)
    return weights(smoothing.query(query), through(name, smoothing.keys(keys)))


@given(_seeds, st.integers(1, 90), st.floats(0, 60))
def test_smoothed_keys_are_attended_as_they_were(seed: int, count: int, bias: float) -> None:
    keys, query = drawn(seed, count, bias)
    smoothing = Smoothing.fit(keys, torch.arange(count), 2 * count, angles)
    torch.testing.assert_close(smoothing.original(smoothing.keys(keys)), keys)
    torch.testing.assert_close(weights(smoothing.query(query), smoothing.keys(keys)), weights(query, keys))
    assert bool((smoothing.scale <= 1).all())
    assert bool((smoothing.scale >= 2.0**-6).all())


@given(_seeds, _formats, st.integers(16, 90), st.floats(-60, 60))
def test_a_constant_in_all_keys_changes_no_answer(seed: int, name: str, count: int, size: float) -> None:
    """Beyond the steps of the format: of int4 a fifteenth of what keys vary by."""
    keys, query = drawn(seed, count, 0)
    constant = size * torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(seed + 1)).double()
    truth = weights(query, keys)
    moved = attended(keys + constant, query, name, count)
    error = (moved - truth).abs().sum(-1).mean()
    assert error < {"exact": 1e-9, "int8": 0.02, "int4": 0.25}[name]
    assert error < 1e-9 + 3 * (attended(keys, query, name, count) - truth).abs().sum(-1).mean()


@given(_seeds, st.sampled_from(["int8", "int4"]), st.integers(24, 60), st.floats(0, 60))
def test_an_answer_may_outgrow_the_prompt(seed: int, name: str, prompt: int, bias: float) -> None:
    """Keys of positions that RoPE carries far from the prompt's, by constants that are the prompt's."""
    keys, query = drawn(seed, 6 * prompt, bias)
    error = (attended(keys, query, name, prompt) - weights(query, keys)).abs().sum(-1).mean()
    plain, _ = drawn(seed, 6 * prompt, 0)
    usual = (attended(plain, query, name, prompt) - weights(query, plain)).abs().sum(-1).mean()
    assert error < 10 * usual


def test_what_is_no_number_stays_in_its_channel() -> None:
    keys, _ = drawn(1, 20, 10)
    clean = Smoothing.fit(keys, torch.arange(20), 40, angles)
    keys[3, 1, 5] = float("nan")
    smoothing = Smoothing.fit(keys, torch.arange(20), 40, angles)
    assert bool(smoothing.center.isfinite().all())
    assert bool(smoothing.scale.isfinite().all())
    assert torch.equal(smoothing.center[0], clean.center[0])
    assert torch.equal(smoothing.scale[0], clean.scale[0])
