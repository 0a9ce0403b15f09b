"""Low-rank rows in a decode step: attended by torch's operators on the device, beside the kernels."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache import Selected, SequenceCache, is_low_rank
from ..steps import Accelerator
from ..stored import StoredRows, in_order


class LowRankReads:
    """The sequences of a step that read low-rank rows, by their number in the batch.

    Give :meth:`attend` to the step, :meth:`fetch` after it; once the device is done, :meth:`scores` has what their
    policies want. Keys are rebuilt for one layer of one sequence at a time.
    """

    def __init__(
        self,
        rows: StoredRows,
        accelerator: Accelerator,
        caches: Sequence[SequenceCache],
        reads: Sequence[Sequence[Sequence[Selected]]],
        scale: float,
    ) -> None:
        """``reads[number][layer]``: what each sequence of the batch attends, these and others."""
        self._rows, self._accelerator, self._caches, self._scale = rows, accelerator, caches, scale
        self._reads = {number: own for number, own in enumerate(reads) if _any_low_rank(own)}
        self._weights: dict[tuple[int, int], list[Tensor]] = {}

    @property
    def numbers(self) -> Set[int]:
        """Which sequences these are."""
        return self._reads.keys()

    def attend(self, layer: int, query: Tensor, attended: Tensor) -> None:
        """Put these sequences' attention into ``attended`` ``[B, H, d]``; ``query`` likewise."""
        for number, read in self._reads.items():
            cache = self._caches[number]
            attended[number], weights = self._rows.attend(cache, layer, read[layer], query[number], self._scale)
            if cache.wants_scores:
                self._weights[layer, number] = weights

    def fetch(self) -> None:
        """Queue one copy of all scores to the host."""
        every = [weights for of_layer in self._weights.values() for weights in of_layer]
        if every:
            lengths = [len(weights) for weights in every]
            host = self._accelerator.host_memory((sum(lengths),), torch.float32)
            host.copy_(torch.cat(every), non_blocking=True)
            pieces = iter(torch.split(host, lengths))
            self._weights = {key: [next(pieces) for _ in own] for key, own in self._weights.items()}

    def scores(self, layer: int, number: int) -> npt.NDArray[np.floating]:
        """A sequence's scores in a layer, in the order of the places that it reads."""
        return in_order(self._reads[number][layer], self._weights[layer, number])


def _any_low_rank(read: Sequence[Sequence[Selected]]) -> bool:
    return any(is_low_rank(each) for of_layer in read for each in of_layer)
