"""What a decode step has to know from the host: one block of int32, copied once per step.

    tokens [B] | positions [B] | slots [L, B] | offsets [L, B + 1] | rows [L, capacity]

B sequences of a bucket, some of which may be missing, and L layers; rows of a table begin at multiples of 16 bytes.
Sizes are fixed, so that a CUDA graph finds everything where it was; how much of it counts is in ``offsets``. The block
weighs 4 bytes per listed row and layer, beside the thousands that attention reads of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .device import Accelerator

Ints = npt.NDArray[np.int32]
_SMALLEST = 256


@dataclass(frozen=True)
class Bucket:
    """The sizes that a recorded step is made for: ``batch`` sequences, ``capacity`` listed rows in a layer; with
    ``scores`` or without."""

    batch: int
    capacity: int
    scores: bool

    @classmethod
    def of(cls, sequences: int, rows: int, scores: bool) -> Bucket:
        """The smallest one: a power of two of sequences, and of rows a power of two, or one and a half of it."""
        batch = 1 << (sequences - 1).bit_length()
        power = max(_SMALLEST, 1 << (rows - 1).bit_length()) if rows else _SMALLEST
        three_quarters = power * 3 // 4
        return cls(batch, three_quarters if _SMALLEST < rows <= three_quarters else power, scores)


class StepTables:
    """The block on the host and on the device, and where its tables lie in it."""

    def __init__(self, accelerator: Accelerator, layers: int, bucket: Bucket) -> None:
        batch, capacity = bucket.batch, bucket.capacity
        self._batch, self._layers = batch, layers
        widths = ((1, batch), (1, batch), (layers, batch), (layers, batch + 1), (layers, capacity))
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
        self._tokens, self._positions, self._slots, self.offsets, self._rows = (
            table.numpy() for table in tables(self._host)
        )
        tokens, positions, self.device_slots, self.device_offsets, self.device_rows = tables(self._device)
        self.device_tokens, self.device_positions = tokens[0], positions[0]

    def fill(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: npt.NDArray[np.integer],
        rows: Sequence[Sequence[Ints]],
    ) -> None:
        """One step of ``b`` sequences: their newest tokens and positions ``[b]``, the new rows' ids ``slots``
        ``[L, b]``, and for each layer the row ids that each sequence reads.

        Sequences that the bucket has room for beyond them write nothing and read nothing.
        """
        count = len(tokens)
        self._tokens[0, :count], self._tokens[0, count:] = tokens, 0
        self._positions[0, :count], self._positions[0, count:] = positions, 0
        self._slots[:, :count], self._slots[:, count:] = slots, -1
        lengths = np.zeros((self._layers, self._batch), dtype=np.int32)
        lengths[:, :count] = [[len(ids) for ids in of_layer] for of_layer in rows]
        np.cumsum(lengths, axis=1, dtype=np.int32, out=self.offsets[:, 1:])
        for layer, of_layer in enumerate(rows):
            np.concatenate(of_layer, out=self._rows[layer, : self.offsets[layer, count]])

    def upload(self) -> None:
        """Queue the copy to the device; the host's side must stay as it is until that is done."""
        self._device.copy_(self._host, non_blocking=True)
