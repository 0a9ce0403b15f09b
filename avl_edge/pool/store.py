"""Where the rows' bytes lie: two tensors, reserved once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import KvShape


class RowStore:
    """K and V of ``capacity`` rows, ``keys`` and ``values`` each ``[capacity, kv_heads, head_dim]``.

    Keys are stored after RoPE, at their original positions, so rows have no order.
    """

    def __init__(self, capacity: int, shape: KvShape, dtype: torch.dtype, device: str = "cpu") -> None:
        size = (capacity, shape.kv_heads, shape.head_dim)
        self.keys = torch.empty(size, dtype=dtype, device=device)
        self.values = torch.empty(size, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put rows in place: ``ids`` int64 ``[n]``, ``keys`` and ``values`` ``[n, kv_heads, head_dim]``."""
        self.keys.index_copy_(0, ids, keys)
        self.values.index_copy_(0, ids, values)
