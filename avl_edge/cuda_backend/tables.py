"""What a decode step has to know from the host: one block of int32, copied once per step.

    tokens [B] | positions [B] | limits [B * 2] | slots [L, P * B] | offsets [L, P * B + 1] | rows [L, capacity]
    and where rows are looked at:  listed [L, P * B] | of_looked [L, P * B + 1] | looked [L, looked]

B sequences of a bucket, some of which may be missing, L layers, P row formats; rows of a table begin at multiples of 16
bytes. Sizes are fixed, so that a CUDA graph finds everything where it was; how much of it counts is in ``offsets``. The
block weighs 4 bytes per listed row and layer, beside the hundreds or thousands that attention reads of each.

A list is that of one sequence and format, and lists stand format by format. Where rows are chosen within the step, a
list has room behind ``listed`` for those that the device puts there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache import Selected
from ..cuda import FORMATS
from .device import Accelerator

Ints = npt.NDArray[np.int32]
_SMALLEST = 256
_WHOLE = 2**30
_NO_ROWS: Ints = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Reads:
    """What one sequence reads in a step: ``rows[layer]``, and of ``looked[layer]``, which are of one format, at most
    ``most`` rows that hold ``share`` of their coarse weight (1: always as many as that). ``text`` is the format of its
    new row."""

    rows: Sequence[Sequence[Selected]]
    text: str = "exact"
    looked: Sequence[Selected] = ()
    share: float = 1
    most: int = 0

    def room(self, layer: int) -> int:
        """Rows that may be chosen."""
        return min(self.most, len(self.looked[layer].ids)) if self.looked else 0


@dataclass(frozen=True)
class Bucket:
    """What a recorded step is made for: ``batch`` sequences, ``capacity`` listed rows in a layer, with ``scores`` or
    without; the ``formats`` of its rows, those of new ones (``written``), and of those that are looked at (``looks``),
    for which there is room for ``looked``."""

    batch: int
    capacity: int
    scores: bool
    formats: tuple[str, ...] = ("exact",)
    written: tuple[str, ...] = ("exact",)
    looked: int = 0
    looks: tuple[str, ...] = ()

    @classmethod
    def of(cls, reads: Sequence[Reads], scores: bool) -> Bucket:
        """The smallest one that holds a step of these sequences: a power of two of them, and of rows a power of two, or
        one and a half of it."""
        layers = range(len(reads[0].rows))
        rows = max(sum(_count(each.rows[layer]) + each.room(layer) for each in reads) for layer in layers)
        looked = max(sum(len(each.looked[layer].ids) for each in reads if each.looked) for layer in layers)
        read = {part.format for each in reads for of_layer in each.rows for part in of_layer}
        looks, written = {part.format for each in reads for part in each.looked}, {each.text for each in reads}
        return cls(
            1 << (len(reads) - 1).bit_length(),
            room_for(rows),
            scores,
            _in_order(read | looks | written),
            _in_order(written),
            room_for(looked) if looked else 0,
            _in_order(looks) if looked else (),
        )


def room_for(rows: int) -> int:
    """The smallest size that holds so many: a power of two, or one and a half of it."""
    power = max(_SMALLEST, 1 << (rows - 1).bit_length()) if rows else _SMALLEST
    three_quarters = power * 3 // 4
    return three_quarters if _SMALLEST < rows <= three_quarters else power


def _in_order(names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in FORMATS if name in names)


def _count(selected: Sequence[Selected]) -> int:
    return sum(len(each.ids) for each in selected)


class StepTables:
    """The block on the host and on the device, and where its tables lie in it."""

    def __init__(self, accelerator: Accelerator, layers: int, bucket: Bucket) -> None:
        self.bucket, self._layers = bucket, layers
        batch, lists = bucket.batch, len(bucket.formats) * bucket.batch
        widths = [(1, batch), (1, batch), (1, 2 * batch), (layers, lists), (layers, lists + 1)]
        widths += [(layers, bucket.capacity)]
        widths += [(layers, lists), (layers, lists + 1), (layers, bucket.looked)] if bucket.looked else []
        strides = [-(-width // 4) * 4 for _, width in widths]
        starts = np.cumsum([0, *(count * stride for (count, _), stride in zip(widths, strides, strict=True))])
        self._host = accelerator.host_memory((int(starts[-1]),), torch.int32)
        self._device = torch.zeros(int(starts[-1]), dtype=torch.int32, device=accelerator.device)

        def tables(block: Tensor) -> list[Tensor]:
            return [
                block[start : start + count * stride].view(count, stride)[:, :width]
                for (count, width), stride, start in zip(widths, strides, starts.tolist(), strict=False)
            ]

        self._host.zero_()
        host = [table.numpy() for table in tables(self._host)]
        self._tokens, self._positions, self._limits, self._slots, self.offsets, self._rows = host[:6]
        tokens, positions, limits, self.device_slots, self.device_offsets, self.device_rows, *looks = tables(
            self._device
        )
        self.device_tokens, self.device_positions, self.device_limits = tokens[0], positions[0], limits[0]
        if bucket.looked:
            self._listed, self.of_looked, self._looked = host[6:]
            self.device_listed, self.device_of_looked, self.device_looked = looks

    def fill(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: npt.NDArray[np.integer],
        reads: Sequence[Reads],
    ) -> None:
        """One step of ``b`` sequences: their newest tokens and positions ``[b]``, the new rows' ids ``slots``
        ``[L, b]``, and what each reads.

        Sequences that the bucket has room for beyond them write nothing and read nothing.
        """
        count, formats, batch = len(tokens), self.bucket.formats, self.bucket.batch
        self._tokens[0, :count], self._tokens[0, count:] = tokens, 0
        self._positions[0, :count], self._positions[0, count:] = positions, 0
        self._slots.fill(-1)
        for number, each in enumerate(reads):
            self._slots[:, formats.index(each.text) * batch + number] = slots[:, number]
        for layer in range(self._layers):
            self._list(layer, reads)
        if self.bucket.looked:
            self._look(reads)

    def _list(self, layer: int, reads: Sequence[Reads]) -> None:
        """The rows that each sequence reads of each format in a layer, and room for those that it will choose."""
        parts = self._lists(reads, [each.rows[layer] for each in reads])
        rooms = [
            each.room(layer) if each.looked and each.looked[layer].format == name else 0
            for name in self.bucket.formats
            for each in self._padded(reads)
        ]
        lengths = [len(ids) for ids in parts]
        np.cumsum(np.add(lengths, rooms), dtype=np.int32, out=self.offsets[layer, 1:])
        room = np.zeros(max(rooms), dtype=np.int32)
        pieces = [piece for ids, spare in zip(parts, rooms, strict=True) for piece in (ids, room[:spare]) if len(piece)]
        np.concatenate([_NO_ROWS, *pieces], out=self._rows[layer, : self.offsets[layer, -1]])
        if self.bucket.looked:
            self._listed[layer] = self.offsets[layer, :-1] + lengths

    def _look(self, reads: Sequence[Reads]) -> None:
        """What each sequence may choose from, and how much of it."""
        for number, each in enumerate(reads):
            self._limits[0, 2 * number : 2 * number + 2] = round(each.share * _WHOLE), each.most
        for layer in range(self._layers):
            parts = self._lists(reads, [[each.looked[layer]] if each.looked else [] for each in reads])
            np.cumsum([len(ids) for ids in parts], dtype=np.int32, out=self.of_looked[layer, 1:])
            np.concatenate([_NO_ROWS, *parts], out=self._looked[layer, : self.of_looked[layer, -1]])

    def _lists(self, reads: Sequence[Reads], selected: Sequence[Sequence[Selected]]) -> list[Ints]:
        """The ids that sequences select, for each format and place of the bucket."""
        missing = [_NO_ROWS] * (self.bucket.batch - len(reads))
        return [ids for name in self.bucket.formats for ids in (*_of_format(name, selected), *missing)]

    def _padded(self, reads: Sequence[Reads]) -> Iterator[Reads]:
        yield from reads
        yield from [Reads(())] * (self.bucket.batch - len(reads))

    def list_of(self, sequence: int, format_: str) -> int:
        """The number of a sequence's list of a format."""
        return self.bucket.formats.index(format_) * self.bucket.batch + sequence

    def upload(self) -> None:
        """Queue the copy to the device; the host's side must stay as it is until that is done."""
        self._device.copy_(self._host, non_blocking=True)


def _of_format(name: str, selected: Sequence[Sequence[Selected]]) -> Iterator[Ints]:
    for own in selected:
        yield next((each.ids for each in own if each.format == name), _NO_ROWS)
