"""Shared by the tests of decode attention: rows as a pool may hold them, row lists, and how near results must be."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from avl_edge.attention import native

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NATIVE = native.available()
needs_native = pytest.mark.skipif(not NATIVE, reason="the native library is not built: pip install -e .")

# The oracle sees the inputs already rounded, and sums are in float32: what a narrow type adds is the rounding of the
# result, half a unit in the last place; a whole one is allowed, for the float32 error that tips a rounding over.
RELATIVE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# Terms of a sum are of size one: where they cancel, the error is relative to them and not to the result.
ABSOLUTE = 1e-5


def pool(rows: int, kv_heads: int, dim: int, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """Random keys and values [rows, kv_heads, dim] as a pool may hold them."""
    if layout == "apart":
        both = torch.randn(2, rows, kv_heads, dim)
    elif layout == "interleaved":
        both = torch.randn(rows, 2, kv_heads, dim).transpose(0, 1)
    elif layout == "one layer of several":
        both = torch.randn(rows, 3, 2, kv_heads, dim)[:, 1].transpose(0, 1)
    else:
        both = torch.randn(2, kv_heads, rows, dim).transpose(1, 2)
    keys, values = both.to(dtype)
    return keys, values


def offsets_of(counts: Sequence[int]) -> Tensor:
    """Where the lists of each sequence begin and end, int32 [batch + 1]."""
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def choose(rows: int, counts: Sequence[int]) -> Tensor:
    """Row ids for each sequence: distinct where the pool has enough, shared between sequences."""
    ids = [torch.randperm(rows)[:n] if n <= rows else torch.randint(rows, (n,)) for n in counts]
    return torch.cat(ids).int() if ids else torch.empty(0, dtype=torch.int32)
