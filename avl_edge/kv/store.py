"""Where the rows' bytes lie: two tensors, reserved once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config import KvShape
from ..machine.allocator import advise_free
from .formats import decode, encode
from .layout import PAGE_ROWS, UNIT, Format


class RowStore:
    """K and V of the rows of ``pages`` pages.

    ``keys`` and ``values``, each ``[rows, kv_heads, head_dim]``, are the rows in the model's dtype; ``key_bytes`` and
    ``value_bytes``, uint8, the same memory, in which packed rows are records. Keys are stored after RoPE, at their
    original positions, so rows have no order.
    """

    def __init__(self, pages: int, shape: KvShape, dtype: torch.dtype, device: str = "cpu") -> None:
        size = (pages * PAGE_ROWS, shape.kv_heads, shape.head_dim)
        self.keys = torch.empty(size, dtype=dtype, device=device)
        self.values = torch.empty(size, dtype=dtype, device=device)
        self.key_bytes = self.keys.view(torch.uint8).flatten()
        self.value_bytes = self.values.view(torch.uint8).flatten()
        self.pages = pages
        self.shape = shape

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def arenas(self, format_: str) -> tuple[Tensor, Tensor]:
        """Keys and values as rows of a format lie in them: rows of numbers for ``exact``, bytes for packed ones."""
        return (self.keys, self.values) if format_ == "exact" else (self.key_bytes, self.value_bytes)

    def index(self, ids: npt.NDArray[np.integer]) -> Tensor:
        """Ids, or places among rows, int64 ``[n]`` on the rows' device; nobody waits for a GPU."""
        index, device = torch.from_numpy(ids.astype(np.int64)), self.keys.device
        # Only from pinned memory a copy is queued like any other work; torch keeps that memory until it is done.
        return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)

    def indices(self, lists: Sequence[npt.NDArray[np.integer]]) -> tuple[Tensor, ...]:
        """:meth:`index` of each of several lists, by one copy."""
        return torch.split(self.index(np.concatenate(lists)), [len(each) for each in lists])

    def write(self, ids: Tensor, keys: Tensor, values: Tensor, format_: str = "exact") -> None:
        """Put rows in place: ``ids`` int64 ``[n]``, ``keys`` and ``values`` ``[n, kv_heads, head_dim]``."""
        ids = ids.to(self.keys.device)
        if format_ == "exact":
            self.keys.index_copy_(0, ids, keys)
            self.values.index_copy_(0, ids, values)
            return
        self.write_records(ids, encode(Format(format_), keys), encode(Format(format_), values))

    def read(self, ids: Tensor, format_: str = "exact") -> tuple[Tensor, Tensor]:
        """Keys and values of rows, each ``[n, kv_heads, head_dim]`` in the model's dtype."""
        ids = ids.to(self.keys.device)
        if format_ == "exact":
            return self.keys[ids], self.values[ids]
        heads, dim, dtype = self.shape.kv_heads, self.shape.head_dim, self.keys.dtype
        keys, values = (decode(Format(format_), each, heads, dim) for each in self.read_records(ids, Format(format_)))
        return keys.to(dtype), values.to(dtype)

    def write_records(self, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put records in place, uint8 ``[n, record_bytes]`` each."""
        units = self._units(ids, keys.shape[1])
        self.key_bytes.view(-1, UNIT).index_copy_(0, units, keys.view(-1, UNIT))
        self.value_bytes.view(-1, UNIT).index_copy_(0, units, values.view(-1, UNIT))

    def read_records(self, ids: Tensor, format_: Format, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Records of keys and of values, uint8 ``[n, record_bytes]`` each; or the first ``size`` bytes of each, whole
        units."""
        size = size or format_.record_bytes(self.shape)
        units = self._units(ids, size)
        keys, values = (arena.view(-1, UNIT)[units].view(-1, size) for arena in (self.key_bytes, self.value_bytes))
        return keys, values

    def copy(self, before: Tensor, after: Tensor, format_: str) -> None:
        """Copy rows of a format as they are, from ids ``before`` to ``after``, int64 ``[n]`` each, none in both."""
        before = before.to(self.keys.device)
        if format_ == "exact":
            self.write(after, self.keys[before], self.values[before])
            return
        self.write_records(after, *self.read_records(before, Format(format_)))

    def give_back(self, pages: npt.NDArray[np.int64]) -> int:
        """Hand the memory of free ``pages``, ascending, back to the operating system; how many bytes went.

        Only whole pages of the system's go, and only on a CPU under Linux; they come back, empty, when they are written
        to. What the pages held is lost.
        """
        if self.keys.device.type != "cpu":
            return 0
        size = self.nbytes // 2 // max(self.pages, 1)
        breaks = np.flatnonzero(np.diff(pages) != 1) + 1
        runs = [(int(run[0]) * size, (int(run[-1]) + 1) * size) for run in np.split(pages, breaks) if len(run)]
        arenas = (self.keys.data_ptr(), self.values.data_ptr())
        return sum(advise_free(start + begin, start + end) for start in arenas for begin, end in runs)

    def _units(self, ids: Tensor, record_bytes: int) -> Tensor:
        """The units of ``n`` records that begin at ``ids``, int64 ``[n * units of a record]``."""
        device = self.keys.device
        return (ids.to(device)[:, None] + torch.arange(record_bytes // UNIT, device=device)).flatten()
