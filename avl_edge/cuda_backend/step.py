"""One decode step of one bucket: all its memory, what runs on the device, and what comes back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cuda import Kernels, Pool, Step, Workspace
from ..models import Llava
from .device import Accelerator
from .tables import Bucket, StepTables


class DecodeStep:
    """``tables`` filled, then :meth:`start`; after the device is done, :attr:`tokens`, :attr:`logits`, :meth:`scores`.

    What the device runs touches only memory that is allocated here, the weights and the pool, and asks the host for
    nothing: it is recorded once and launched as a whole.
    """

    def __init__(
        self, model: Llava, kernels: Kernels, pool: Pool, accelerator: Accelerator, bucket: Bucket, splits: int
    ) -> None:
        text, device = model.spec.text, accelerator.device
        self._model, self._kernels, self._pool, self._accelerator = model, kernels, pool, accelerator
        self.tables = StepTables(accelerator, text.layers, bucket)
        batch = bucket.batch
        self._workspace = Workspace.of(kernels.shape, batch, text.heads, splits, bucket.capacity, scores=bucket.scores)
        self._scratch = torch.empty(self._workspace.bytes, dtype=torch.uint8, device=device)
        self._attended = torch.empty(batch, text.heads, text.head_dim, dtype=model.dtype, device=device)
        self._outputs = {
            "logits": torch.empty(batch, text.vocab_size, dtype=model.dtype, device=device),
            "tokens": torch.empty(batch, dtype=torch.int64, device=device),
        }
        if bucket.scores:
            size = (text.layers, bucket.capacity)
            self._outputs["scores"] = torch.empty(size, dtype=torch.float32, device=device)
        self._results = {
            name: accelerator.host_memory(tuple(output.shape), output.dtype) for name, output in self._outputs.items()
        }
        self._replay: Callable[[], None] | None = None

    def start(self, *, logits: bool) -> None:
        """Queue everything: tables up, the step, and down come the likeliest tokens, the scores of a bucket that has
        them and, when asked for, the logits."""
        self.tables.upload()
        if self._replay is None:
            self._replay = self._accelerator.record(self.run)
        self._replay()
        for name, output in self._outputs.items():
            if logits or name != "logits":
                self._results[name].copy_(output, non_blocking=True)

    def run(self) -> None:
        """The step on the device, from its tables to its outputs. Running it twice is running it once."""
        decoder, tables = self._model.decoder, self.tables
        hidden = decoder.embed(tables.device_tokens)
        angles = decoder.angles(tables.device_positions)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            self._attend(index, query.contiguous(), key.contiguous(), value.contiguous())
            hidden = layer.finish(hidden, self._attended)
        logits = self._outputs["logits"]
        logits.copy_(decoder.logits(hidden))
        torch.argmax(logits, dim=-1, out=self._outputs["tokens"])

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        tables, scores = self.tables, self._outputs.get("scores")
        step = Step(
            query=address(query),
            new_keys=address(key),
            new_values=address(value),
            slots=address(tables.device_slots[layer]),
            rows=address(tables.device_rows[layer]),
            offsets=address(tables.device_offsets[layer]),
            out=address(self._attended),
            scores=0 if scores is None else address(scores[layer]),
        )
        stream = self._accelerator.stream()
        self._kernels.step(step, self._pool, self._workspace, address(self._scratch), stream)

    @property
    def tokens(self) -> list[int]:
        """The likeliest token of each place in the batch."""
        tokens: list[int] = self._results["tokens"].tolist()
        return tokens

    @property
    def logits(self) -> Tensor:
        """``[B, vocabulary]`` on the host, overwritten by the next step of this bucket."""
        return self._results["logits"]

    def scores(self, layer: int, sequence: int) -> npt.NDArray[np.float32]:
        """The weights of the rows that one sequence read in a layer, in the order of its list."""
        begin, end = self.tables.offsets[layer, sequence : sequence + 2]
        scores: npt.NDArray[np.float32] = self._results["scores"][layer, begin:end].numpy().copy()
        return scores


def address(tensor: Tensor) -> int:
    """Where a tensor's first element lies."""
    return int(tensor.data_ptr())
