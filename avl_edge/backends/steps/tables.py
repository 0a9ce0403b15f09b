"""What a decode step has to know from the host: one block of int32, copied once per step.

    tokens [B] | positions [B] | limits [B * 2] | slots [L, P * B] | offsets [L, P * B + 1] | rows [L, capacity]
    smoothing [L, B]
    and where rows are scanned:  listed [L, P * B] | of_scanned [L, P * B + 1] | scanned [L, scanned]
    and where rows are low-rank:   row_positions [L, capacity] | bases [L, B * rank]

B sequences of a bucket, some of which may be missing, L layers, P row formats; rows of a table begin at multiples of 16
bytes. Sizes are fixed, so that a CUDA graph finds everything where it was; how much of it counts is in ``offsets``. The
block weighs 4 bytes per listed row and layer, 8 with low-rank rows, beside the hundreds or thousands that attention
reads of each.

A list is that of one sequence and format, and lists stand format by format. Where rows are chosen within the step, a
list has room behind ``listed`` for those that the device puts there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...attention.cuda import in_order
from ...kv.layout import Format
from ...kv.selection import Selected
from .device import Accelerator

Ints = npt.NDArray[np.int32]
_SMALLEST = 256
_WHOLE = 2**30
_EMPTY: Ints = np.empty(0, dtype=np.int32)
_NONE: Ints = np.array([-1], dtype=np.int32)
_NO_ROWS = Selected("", _EMPTY.astype(np.int64), _EMPTY, _EMPTY)


@dataclass(frozen=True)
class Reads:
    """What one sequence reads in a step: ``rows[layer]``, and of ``scanned[layer]``, which are of one format, at most
    ``most`` rows that hold ``share`` of their coarse weight (1: always as many as that). ``text`` is the format of its
    new row; ``basis[layer]`` what it has for low-rank rows; ``smoothing`` ``[L]`` the rows by which its keys are
    smoothed, -1: none, or ``[1]`` where no layer has one."""

    rows: Sequence[Sequence[Selected]]
    text: str = "exact"
    scanned: Sequence[Selected] = ()
    share: float = 1
    most: int = 0
    basis: Sequence[Ints] = ()
    smoothing: Ints = field(default_factory=lambda: _NONE)

    def room(self, layer: int) -> int:
        """Rows that may be chosen."""
        return min(self.most, len(self.scanned[layer].ids)) if self.scanned else 0


@dataclass(frozen=True)
class Bucket:
    """What a recorded step is made for: ``batch`` sequences, ``capacity`` listed rows in a layer, with ``scores`` or
    without; the ``formats`` of its rows, those of new ones (``written``), and of those that are scanned
    (``scanned_formats``), for which there is room for ``scanned``; whether any sequence ``smooths`` its keys."""

    batch: int
    capacity: int
    scores: bool
    formats: tuple[str, ...] = ("exact",)
    written: tuple[str, ...] = ("exact",)
    scanned: int = 0
    scanned_formats: tuple[str, ...] = ()
    smooths: bool = False

    @property
    def rank(self) -> int:
        """The most directions of a basis that rows are read by; 0 where none are low-rank."""
        return max(Format(name).basis_rows_read for name in self.formats)

    @classmethod
    def of(cls, reads: Sequence[Reads], scores: bool) -> Bucket:
        """The smallest one that holds a step of these sequences: a power of two of them, and of rows a power of two, or
        one and a half of it."""
        layers = range(len(reads[0].rows))
        scanning = [each for each in reads if each.scanned]
        rows = max(sum([len(part) for each in reads for part in each.rows[layer]]) for layer in layers)
        rows += max(sum(each.room(layer) for each in scanning) for layer in layers) if scanning else 0
        scanned = max(sum(len(each.scanned[layer].ids) for each in scanning) for layer in layers) if scanning else 0
        read = {part.format for each in reads for of_layer in each.rows for part in of_layer}
        scanned_formats, written = (
            {part.format for each in scanning for part in each.scanned},
            {each.text for each in reads},
        )
        return cls(
            1 << (len(reads) - 1).bit_length(),
            room_for(rows),
            scores,
            in_order(read | scanned_formats | written),
            in_order(written),
            room_for(scanned) if scanned else 0,
            in_order(scanned_formats) if scanned else (),
            any((each.smoothing >= 0).any() for each in reads),
        )


def room_for(rows: int) -> int:
    """The smallest size that holds so many: a power of two, or one and a half of it."""
    power = max(_SMALLEST, 1 << (rows - 1).bit_length()) if rows else _SMALLEST
    three_quarters = power * 3 // 4
    return three_quarters if _SMALLEST < rows <= three_quarters else power


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to


class StepTables:
    """The block on the host and on the device, and where its tables lie in it."""

    def __init__(self, accelerator: Accelerator, layers: int, bucket: Bucket, *, dense: bool = False) -> None:
        """``dense``: the rows of a table follow each other without gaps, and tables begin at multiples of 256 bytes: as
        engines want their inputs."""
        self.bucket, self._layers, self._range = bucket, layers, range(layers)
        batch, lists = bucket.batch, len(bucket.formats) * bucket.batch
        widths = [(1, batch), (1, batch), (1, 2 * batch), (layers, lists), (layers, lists + 1)]
        widths += [(layers, bucket.capacity), (layers, batch)]
        widths += [(layers, lists), (layers, lists + 1), (layers, bucket.scanned)] if bucket.scanned else []
        widths += [(layers, bucket.capacity), (layers, batch * bucket.rank)] if bucket.rank else []
        strides = [width if dense else _aligned(width, 4) for _, width in widths]
        sizes = [_aligned(count * stride, 64) for (count, _), stride in zip(widths, strides, strict=True)]
        starts = np.cumsum([0, *sizes])
        self._host = accelerator.host_memory((int(starts[-1]),), torch.int32)
        self._device = torch.zeros(int(starts[-1]), dtype=torch.int32, device=accelerator.device)

        def tables(block: Tensor) -> list[Tensor]:
            return [
                block[start : start + count * stride].view(count, stride)[:, :width]
                for (count, width), stride, start in zip(widths, strides, starts.tolist(), strict=False)
            ]

        self._host.zero_()
        host = [table.numpy() for table in tables(self._host)]
        self._tokens, self._positions, self._limits, self._slots, self.offsets, self._rows, self._smoothing = host[:7]
        tokens, positions, limits, self.device_slots, self.device_offsets, self.device_rows, *rest = tables(
            self._device
        )
        self.device_smoothing, *rest = rest
        self.device_tokens, self.device_positions, self.device_limits = tokens[0], positions[0], limits[0]
        if bucket.scanned:
            self._listed, self.of_scanned, self._scanned = host[7:10]
            self.device_listed, self.device_of_scanned, self.device_scanned = rest[:3]
        if bucket.rank:
            self._row_positions, self._bases = host[-2:]
            self.device_row_positions, self.device_bases = rest[-2:]

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
        self._smoothing.fill(-1)
        for number, each in enumerate(reads):
            self._smoothing[:, number] = each.smoothing
            self._slots[:, formats.index(each.text) * batch + number] = slots[:, number]
        lists = [self._lists([each.rows[layer] for each in reads]) for layer in self._range]
        if self.bucket.scanned:
            self._fill_with_room(lists, reads)
        else:
            np.cumsum(self._lengths(lists), axis=1, dtype=np.int32, out=self.offsets[:, 1:])
            for layer, of_layer in enumerate(lists):
                ids = [part.ids for each in of_layer for part in each.parts]
                np.concatenate(ids, out=self._rows[layer, : self.offsets[layer, -1]])
        if self.bucket.rank:
            self._fill_low_rank(lists, reads)

    def _fill_low_rank(self, lists: Sequence[Sequence[Selected]], reads: Sequence[Reads]) -> None:
        """The positions of the listed rows, and each sequence's basis."""
        rank = self.bucket.rank
        for layer, of_layer in enumerate(lists):
            for own, at in zip(of_layer, self._numbers(len(reads)), strict=True):
                begin = self.offsets[layer, at]
                self._row_positions[layer, begin : begin + len(own.ids)] = own.positions
        for number, each in enumerate(reads):
            for layer, basis in enumerate(each.basis):
                ids = basis[:rank]
                self._bases[layer, number * rank : number * rank + len(ids)] = ids

    def _fill_with_room(self, lists: Sequence[Sequence[Selected]], reads: Sequence[Reads]) -> None:
        """The rows that are listed, room behind them for those that are chosen, and what those are chosen from."""
        lengths, rooms = self._lengths(lists), np.zeros_like(self._listed)
        scanned = [
            self._lists([[each.scanned[layer]] if each.scanned else [] for each in reads]) for layer in self._range
        ]
        for number, each in enumerate(reads):
            self._limits[0, 2 * number : 2 * number + 2] = round(each.share * _WHOLE), each.most
            for layer in self._range if each.scanned else ():
                rooms[layer, self.list_of(number, each.scanned[layer].format)] = each.room(layer)
        np.cumsum(lengths + rooms, axis=1, dtype=np.int32, out=self.offsets[:, 1:])
        self._listed[:] = self.offsets[:, :-1] + lengths
        np.cumsum(self._lengths(scanned), axis=1, dtype=np.int32, out=self.of_scanned[:, 1:])
        for layer in self._range:
            candidates = [own.ids for own in scanned[layer]]
            np.concatenate(candidates, out=self._scanned[layer, : self.of_scanned[layer, -1]])
            for own, number in zip(lists[layer], self._numbers(len(reads)), strict=True):
                self._rows[layer, self.offsets[layer, number] : self._listed[layer, number]] = own.ids

    def _lists(self, selected: Sequence[Sequence[Selected]]) -> list[Selected]:
        """What each sequence selects, format by format."""
        return [_of_format(name, own) for name in self.bucket.formats for own in selected]

    def _lengths(self, lists: Sequence[Sequence[Selected]]) -> npt.NDArray[np.int32]:
        """How long each list is, int32 ``[L, P * B]``."""
        parts, batch = len(self.bucket.formats), self.bucket.batch
        lengths = np.zeros((self._layers, parts, batch), dtype=np.int32)
        counts = np.array([[len(each) for each in of_layer] for of_layer in lists], dtype=np.int32)
        lengths[:, :, : len(lists[0]) // parts] = counts.reshape(self._layers, parts, -1)
        return lengths.reshape(self._layers, -1)

    def _numbers(self, count: int) -> Iterator[int]:
        """The numbers of the lists of the first ``count`` sequences, format by format."""
        for part in range(len(self.bucket.formats)):
            yield from range(part * self.bucket.batch, part * self.bucket.batch + count)

    def list_of(self, sequence: int, format_: str) -> int:
        """The number of a sequence's list of a format."""
        return self.bucket.formats.index(format_) * self.bucket.batch + sequence

    def upload(self) -> None:
        """Queue the copy to the device; the host's side must stay as it is until that is done."""
        self._device.copy_(self._host, non_blocking=True)


def _of_format(name: str, selected: Sequence[Selected]) -> Selected:
    for each in selected:
        if each.format == name:
            return each
    return _NO_ROWS
