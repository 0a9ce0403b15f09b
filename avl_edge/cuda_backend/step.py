"""One decode step of one bucket: all its memory, what runs on the device, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cuda import Kernels, Lists, Look, Pool, Step, Workspace
from ..models import Llava
from .device import Accelerator
from .tables import Bucket, StepTables

Beside = Callable[[int, Tensor, Tensor], None]
"""What attends beside the kernels: of a layer by its number it takes query ``[B, H, d]``, and puts what is its own into
what was attended, ``[B, H, d]``. The new rows are written when it is called."""


class DecodeStep:
    """``tables`` filled, then :meth:`start`; after the device is done, :attr:`tokens`, :attr:`logits`, :meth:`scores`,
    :meth:`picked`.

    What the device runs touches only memory that is allocated here, the weights and the pool, and asks the host for
    nothing: it is recorded once and launched as a whole, unless something attends beside it.
    """

    def __init__(
        self, model: Llava, kernels: Kernels, pool: Pool, accelerator: Accelerator, bucket: Bucket, splits: int
    ) -> None:
        text, device = model.spec.text, accelerator.device
        self._model, self._kernels, self._pool, self._accelerator = model, kernels, pool, accelerator
        self.tables = StepTables(accelerator, text.layers, bucket)
        batch = bucket.batch
        self._workspace = Workspace.of(
            kernels.shape,
            batch,
            text.heads,
            splits,
            bucket.capacity,
            scores=bucket.scores,
            parts=len(bucket.formats),
            looked=bucket.looked,
        )
        self._scratch = torch.empty(self._workspace.bytes, dtype=torch.uint8, device=device)
        self._attended = torch.empty(batch, text.heads, text.head_dim, dtype=model.dtype, device=device)
        self._outputs = {
            "logits": torch.empty(batch, text.vocab_size, dtype=model.dtype, device=device),
            "tokens": torch.empty(batch, dtype=torch.int64, device=device),
        }
        if bucket.scores:
            size = (text.layers, bucket.capacity)
            self._outputs["scores"] = torch.empty(size, dtype=torch.float32, device=device)
        if bucket.looked:
            size = (text.layers, bucket.looked)
            self._outputs["picked"] = torch.zeros(size, dtype=torch.int8, device=device)
            self._ends = torch.zeros(len(bucket.formats) * batch, dtype=torch.int32, device=device)
        self._results = {
            name: accelerator.host_memory(tuple(output.shape), output.dtype) for name, output in self._outputs.items()
        }
        self._replay: Callable[[], None] | None = None

    def start(self, *, logits: bool, beside: Beside | None = None) -> None:
        """Queue everything: tables up, the step, and down come the likeliest tokens, the scores and the choices of a
        bucket that has them and, when asked for, the logits. With ``beside`` the step is launched operator by operator,
        from the same tables."""
        self.tables.upload()
        if beside is not None:
            self.run(beside)
        else:
            if self._replay is None:
                self._replay = self._accelerator.record(self.run)
            self._replay()
        for name, output in self._outputs.items():
            if logits or name != "logits":
                self._results[name].copy_(output, non_blocking=True)

    def run(self, beside: Beside | None = None) -> None:
        """The step on the device, from its tables to its outputs. Running it twice is running it once."""
        decoder, tables = self._model.decoder, self.tables
        hidden = decoder.embed(tables.device_tokens)
        angles = decoder.angles(tables.device_positions)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            self._attend(index, query.contiguous(), key.contiguous(), value.contiguous())
            if beside is not None:
                beside(index, query, self._attended)
            hidden = layer.finish(hidden, self._attended)
        logits = self._outputs["logits"]
        logits.copy_(decoder.logits(hidden))
        torch.argmax(logits, dim=-1, out=self._outputs["tokens"])

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        tables, scores, bucket = self.tables, self._outputs.get("scores"), self.tables.bucket
        rows, offsets = address(tables.device_rows[layer]), address(tables.device_offsets[layer])
        lists = Lists.of(rows, offsets, bucket.batch, bucket.capacity, bucket.formats)
        look = self._look(layer) if bucket.looked else None
        step = Step(
            query=address(query),
            new_keys=address(key),
            new_values=address(value),
            slots=address(tables.device_slots[layer]),
            lists=lists if look is None else replace(lists, ends=address(self._ends)),
            out=address(self._attended),
            scores=0 if scores is None else address(scores[layer]),
            written=bucket.written,
            look=look,
        )
        stream = self._accelerator.stream()
        self._kernels.step(step, self._pool, self._workspace, address(self._scratch), stream)

    def _look(self, layer: int) -> Look:
        tables, bucket = self.tables, self.tables.bucket
        rows, offsets = address(tables.device_looked[layer]), address(tables.device_of_looked[layer])
        return Look(
            lists=Lists.of(rows, offsets, bucket.batch, bucket.looked, bucket.formats),
            formats=bucket.looks,
            limits=address(tables.device_limits),
            listed=address(tables.device_listed[layer]),
            picked=address(self._outputs["picked"][layer]),
        )

    @property
    def tokens(self) -> list[int]:
        """The likeliest token of each place in the batch."""
        tokens: list[int] = self._results["tokens"].tolist()
        return tokens

    @property
    def logits(self) -> Tensor:
        """``[B, vocabulary]`` on the host, overwritten by the next step of this bucket."""
        return self._results["logits"]

    def scores(self, layer: int, sequence: int, format_: str) -> Tensor:
        """The weights of the rows of a format that one sequence read in a layer, in the order of its list: float32, on
        the host, overwritten by the next step of this bucket."""
        number = self.tables.list_of(sequence, format_)
        begin, end = self.tables.offsets[layer, number : number + 2]
        return self._results["scores"][layer, begin:end]

    def picked(self, layer: int, sequence: int, format_: str) -> npt.NDArray[np.bool_]:
        """Which of the rows that one sequence looked at in a layer it attended, in the order of that list."""
        number = self.tables.list_of(sequence, format_)
        begin, end = self.tables.of_looked[layer, number : number + 2]
        picked: npt.NDArray[np.bool_] = self._results["picked"][layer, begin:end].numpy().astype(np.bool_)
        return picked


def address(tensor: Tensor) -> int:
    """Where a tensor's first element lies."""
    return int(tensor.data_ptr())
