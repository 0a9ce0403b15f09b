"""A decode step that is recorded once and replayed, whoever computes it: its tables go up, its results come down."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...kv.selection import Selection, StepScores
from ...machine.ledger import Entry
from .device import Accelerator
from .tables import Bucket, Reads, StepTables

KEPT_STEPS = 12
"""Steps that are kept; each holds its tables and scratch memory, tens of MB for a 7B model and a large batch."""


class RecordedStep(ABC):
    """``tables`` filled, then :meth:`start`; after the device is done, :attr:`tokens`, :meth:`logits`, :meth:`scores`,
    :meth:`picked`."""

    def __init__(
        self,
        accelerator: Accelerator,
        tables: StepTables,
        outputs: Mapping[str, Tensor],
        scratch: Iterable[Tensor] = (),
    ) -> None:
        """``outputs`` on the device, which :meth:`run` writes: "tokens" int64 ``[B]``, "logits" ``[B, vocabulary]``
        and, in a bucket that has them, "scores" float32 ``[L, capacity]`` and "picked" int8 ``[L, scanned]``.
        ``scratch``: what else the step has there for itself."""
        self.tables, self._accelerator, self.outputs = tables, accelerator, outputs
        self._results = {
            name: accelerator.host_memory(tuple(output.shape), output.dtype)
            for name, output in outputs.items()
            if name != "logits"
        }
        self._replay: Callable[[], None] | None = None
        sizes: dict[int, int] = {}
        for each in (*outputs.values(), *scratch):  # an output may be a part of what is scratch too
            sizes[each.data_ptr()] = max(each.nbytes, sizes.get(each.data_ptr(), 0))
        self.nbytes = tables.nbytes + sum(sizes.values()) + sum(each.nbytes for each in self._results.values())
        """What it holds on the device and on the host. What a recording itself takes, torch does not tell."""

    @abstractmethod
    def run(self) -> None:
        """The step on the device, from its tables to its outputs. Running it twice is running it once."""

    def start(self) -> None:
        """Queue everything: tables up, the step, and down come the likeliest tokens, and the scores and the choices of
        a bucket that has them."""
        self.tables.upload()
        if self._replay is None:
            self._replay = self._accelerator.record(self.run)
        self._replay()
        for name, result in self._results.items():
            result.copy_(self.outputs[name], non_blocking=True)

    @property
    def tokens(self) -> list[int]:
        """The likeliest token of each slot of the batch."""
        tokens: list[int] = self._results["tokens"].tolist()
        return tokens

    def logits(self, count: int) -> Tensor:
        """Those of the first ``count`` sequences, ``[count, vocabulary]``, on the device."""
        return self.outputs["logits"][:count].clone()

    def scores(self, sequence: int, reads: Reads) -> StepScores:
        """The weights of the rows that one sequence read: float32, on the host."""
        scores = StepScores(reads.rows, np.float32)
        scores.give(self.tables.lists_of(sequence, reads), self.tables.offsets, self._results["scores"].numpy())
        return scores

    def picked(self, sequence: int, scanned: Selection) -> npt.NDArray[np.bool_]:
        """Which of the rows that one sequence scanned it attended: ``[L, n]``, in the order of each layer's list."""
        begin = self.tables.of_scanned[:, self.tables.list_of(sequence, scanned.format)]
        places = begin[:, None] + np.arange(scanned.counts.max(initial=0))
        results = self._results["picked"].numpy()
        picked = np.take_along_axis(results, np.minimum(places, results.shape[1] - 1), axis=1)
        return picked.astype(np.bool_)


S = TypeVar("S", bound=RecordedStep)


class RecordedSteps(OrderedDict[Bucket, S]):
    """The steps of the buckets that were seen lately, made by ``make``, on one device, one after the other. ``entry``:
    under which they are counted; they go, the least recently used first, as its limit asks."""

    def __init__(self, accelerator: Accelerator, make: Callable[[Bucket], S], entry: Entry | None = None) -> None:
        super().__init__()
        self._accelerator, self._make = accelerator, make
        self.entry = entry or Entry("recorded steps")
        self._under_way = False

    @contextmanager
    def run(
        self,
        step: S,
        token_ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[npt.NDArray[np.integer]],
        reads: Sequence[Reads],
    ) -> Iterator[None]:
        """Fill a step's tables and start it: ``slots[sequence]`` ``[L]``, the others as :meth:`StepTables.fill` takes
        them. What stands in the ``with`` is done by the host meanwhile; the results are there at its end."""
        if self._under_way:  # a step was interrupted: its copies may still read what is filled next
            self._accelerator.synchronize()
        step.tables.fill(token_ids, positions, np.stack(slots, axis=1), reads)
        self._under_way = True
        step.start()
        yield
        self._accelerator.synchronize()
        self._under_way = False

    def of(self, bucket: Bucket) -> S:
        """That of a bucket, new or as it was recorded."""
        if bucket not in self:
            if len(self) >= KEPT_STEPS:
                self._drop_oldest()
            step = self._make(bucket)
            while self and not self.entry.fits(step.nbytes):
                self._drop_oldest()
            self.entry.hold(bucket, step.nbytes, "a decode step of so many sequences and rows")
            self[bucket] = step
        self.move_to_end(bucket)
        return self[bucket]

    def _drop_oldest(self) -> None:
        bucket, _ = self.popitem(last=False)
        self.entry.release(bucket)
