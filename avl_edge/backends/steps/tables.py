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

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...attention.cuda import in_order
from ...kv.layout import Format
from ...kv.selection import Numbered, Selection, list_rows
from .device import Accelerator

Ints = npt.NDArray[np.int32]
_SMALLEST = 256
_WHOLE = 2**30
_NONE: Ints = np.array([-1], dtype=np.int32)


@dataclass(frozen=True)
class Reads:
    """What one sequence reads in a step: ``rows``, its images' and then its text's, and of those in ``scanned`` at most
    ``most`` rows of a layer that hold ``share`` of their coarse weight (1: always as many as that). ``text`` is the
    format of its new row; ``basis[layer]`` what it has for low-rank rows; ``smoothing`` ``[L]`` the rows by which its
    keys are smoothed, -1: none, or ``[1]`` where no layer has one."""

    rows: Sequence[Selection]
    text: str = "exact"
    scanned: Selection | None = None
    share: float = 1
    most: int = 0
    basis: Sequence[Ints] = ()
    smoothing: Ints = field(default_factory=lambda: _NONE)

    @property
    def room(self) -> Ints | int:
        """Rows of each layer that may be chosen."""
        return np.minimum(self.most, self.scanned.counts) if self.scanned else 0


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
        scanning = [each.scanned for each in reads if each.scanned]
        rows = sum(part.counts for each in reads for part in each.rows) + sum(each.room for each in reads)
        scanned = np.max(sum(each.counts for each in scanning), initial=0) if scanning else 0
        read = {part.format for each in reads for part in each.rows if part.total}
        scanned_formats, written = {each.format for each in scanning}, {each.text for each in reads}
        return cls(
            1 << (len(reads) - 1).bit_length(),
            room_for(int(np.max(rows, initial=0))),
            scores,
            in_order(read | scanned_formats | written),
            in_order(written),
            room_for(int(scanned)) if scanning else 0,
            in_order(scanned_formats) if scanning else (),
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
        self.bucket, self._rank = bucket, bucket.rank
        batch, lists = bucket.batch, len(bucket.formats) * bucket.batch
        widths = [(1, batch), (1, batch), (1, 2 * batch), (layers, lists), (layers, lists + 1)]
        widths += [(layers, bucket.capacity), (layers, batch)]
        widths += [(layers, lists), (layers, lists + 1), (layers, bucket.scanned)] if bucket.scanned else []
        widths += [(layers, bucket.capacity), (layers, batch * self._rank)] if self._rank else []
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
        if self._rank:
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
        listed = [pair for n, each in enumerate(reads) for pair in zip(self.lists_of(n, each), each.rows, strict=True)]
        lengths = self._lengths(listed)
        if self.bucket.scanned:
            lengths = self._leave_room(lengths, reads)
        np.cumsum(lengths, axis=1, dtype=np.int32, out=self.offsets[:, 1:])
        list_rows(listed, self.offsets, self._rows)
        if self._rank:
            list_rows(listed, self.offsets, self._row_positions, positions=True)
            self._fill_bases(reads)

    def _leave_room(self, lengths: Ints, reads: Sequence[Reads]) -> Ints:
        """Fill in what rows are chosen from; the lengths of lists that have room behind them for those that are."""
        scanning = [(number, each.scanned, each) for number, each in enumerate(reads) if each.scanned]
        candidates = [(self.list_of(number, rows.format), rows) for number, rows, _ in scanning]
        np.cumsum(self._lengths(candidates), axis=1, dtype=np.int32, out=self.of_scanned[:, 1:])
        list_rows(candidates, self.of_scanned, self._scanned)
        rooms = np.zeros_like(lengths)
        for (number, _, each), (list_, _) in zip(scanning, candidates, strict=True):
            self._limits[0, 2 * number : 2 * number + 2] = round(each.share * _WHOLE), each.most
            rooms[:, list_] = each.room
        both = lengths + rooms
        self._listed[:] = np.cumsum(both, axis=1) - rooms
        return both

    def _fill_bases(self, reads: Sequence[Reads]) -> None:
        rank = self._rank
        for number, each in enumerate(reads):
            for layer, basis in enumerate(each.basis):
                ids = basis[:rank]
                self._bases[layer, number * rank : number * rank + len(ids)] = ids

    def lists_of(self, sequence: int, reads: Reads) -> list[int]:
        """The numbers of the lists in which stands what a sequence reads; any, for a format of which it has no rows."""
        formats = self.bucket.formats
        return [self.list_of(sequence, each.format) if each.format in formats else 0 for each in reads.rows]

    def _lengths(self, listed: Numbered) -> Ints:
        """How long each list is, int32 ``[L, P * B]``."""
        lists = len(self.bucket.formats) * self.bucket.batch
        lengths: Ints = np.zeros((len(self.offsets), lists), dtype=np.int32)
        for number, each in listed:
            lengths[:, number] += each.counts
        return lengths

    def list_of(self, sequence: int, format_: str) -> int:
        """The number of a sequence's list of a format."""
        return self.bucket.formats.index(format_) * self.bucket.batch + sequence

    @property
    def nbytes(self) -> int:
        """Of the block, on the host and on the device."""
        return self._host.nbytes + self._device.nbytes

    def upload(self) -> None:
        """Queue the copy to the device; the host's side must stay as it is until that is done."""
        self._device.copy_(self._host, non_blocking=True)
