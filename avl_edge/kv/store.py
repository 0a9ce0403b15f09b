"""Where the rows' bytes lie: two arenas of one memory, reserved once."""

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
    ``value_bytes``, uint8, the same memory, in which packed rows are records; ``all_bytes`` both, values behind keys,
    in which records of a key and a value are. Keys are stored after RoPE, at their original positions, so rows have no
    order.
    """

    def __init__(self, pages: int, shape: KvShape, dtype: torch.dtype, device: str = "cpu") -> None:
        size = (pages * PAGE_ROWS, shape.kv_heads, shape.head_dim)
        both = torch.empty(2, *size, dtype=dtype, device=device)
        self.keys, self.values = both.unbind()
        self.all_bytes = both.view(torch.uint8).flatten()
        self.key_bytes, self.value_bytes = (each.view(torch.uint8).flatten() for each in (self.keys, self.values))
        self.pages = pages
        self.shape = shape

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def arenas(self, format_: str) -> tuple[Tensor, Tensor]:
        """Keys and values as rows of a format lie in them: rows of numbers for ``exact``, bytes for packed ones."""
        if format_ == "exact":
            return self.keys, self.values
        form = Format(format_)
        if form.is_mixed:
            return self.all_bytes, self.all_bytes[form.keys.record_bytes(self.shape) :]
        return self.key_bytes, self.value_bytes

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
        form = Format(format_)
        self.write_records(ids, form, encode(form.keys, keys), encode(form.values, values))

    def read(self, ids: Tensor, format_: str = "exact") -> tuple[Tensor, Tensor]:
        """Keys and values of rows, each ``[n, kv_heads, head_dim]`` in the model's dtype."""
        ids = ids.to(self.keys.device)
        if format_ == "exact":
            return self.keys[ids], self.values[ids]
        heads, dim, dtype, form = self.shape.kv_heads, self.shape.head_dim, self.keys.dtype, Format(format_)
        keys, values = self.read_records(ids, form)
        return decode(form.keys, keys, heads, dim).to(dtype), decode(form.values, values, heads, dim).to(dtype)

    def write_records(self, ids: Tensor, format_: Format, keys: Tensor, values: Tensor) -> None:
        """Put records in place, uint8 ``[n, record_bytes]`` of the keys' and of the values' format."""
        for arena, units, records in zip(
            self.arenas(format_.name), self._units(ids, keys.shape[1], values.shape[1]), (keys, values), strict=True
        ):
            arena.view(-1, UNIT).index_copy_(0, units, records.view(-1, UNIT))

    def read_records(self, ids: Tensor, format_: Format, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Records of keys and of values, uint8 ``[n, record_bytes]`` of the one's and of the other's format; or the
        first ``size`` bytes of each, whole units."""
        sizes = [size or each.record_bytes(self.shape) for each in (format_.keys, format_.values)]
        every = zip(self.arenas(format_.name), self._units(ids, *sizes), sizes, strict=True)
        keys, values = (arena.view(-1, UNIT)[units].view(-1, length) for arena, units, length in every)
        return keys, values

    def copy(self, before: Tensor, after: Tensor, format_: str) -> None:
        """Copy rows of a format as they are, from ids ``before`` to ``after``, int64 ``[n]`` each, none in both."""
        before = before.to(self.keys.device)
        if format_ == "exact":
            self.write(after, self.keys[before], self.values[before])
            return
        form = Format(format_)
        self.write_records(after, form, *self.read_records(before, form))

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

    def _units(self, ids: Tensor, *record_bytes: int) -> list[Tensor]:
        """The units of ``n`` records of each size that begin at ``ids``, int64 ``[n * units of a record]``."""
        device = self.keys.device
        made = {
            size: (ids.to(device)[:, None] + torch.arange(size // UNIT, device=device)).flatten()
            for size in set(record_bytes)
        }
        return [made[size] for size in record_bytes]
