"""One decode step of one bucket: its memory, the engine's run, and what comes back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cuda_backend import Accelerator, Bucket, StepTables
from ..engine import STEP
from ..export import bindings as names
from ..pool import RowStore
from .engines import Buffers, Engines


class EngineStep:
    """``tables`` filled, then :meth:`start`; when it is done, :attr:`tokens`, :attr:`logits`, :meth:`scores`."""

    def __init__(self, engines: Engines, store: RowStore, accelerator: Accelerator, bucket: Bucket) -> None:
        text, device, batch = engines.spec.text, accelerator.device, bucket.batch
        self._engines, self._accelerator = engines, accelerator
        self.tables = StepTables(accelerator, text.layers, bucket, dense=True)

        def fixed(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        given = {
            names.TOKEN_IDS: self.tables.device_tokens,
            names.FEATURES: torch.zeros(1, text.hidden_size, dtype=store.keys.dtype, device=device),
            names.FEATURE_ROWS: fixed(*[-1] * batch),
            names.POSITIONS: self.tables.device_positions,
            names.TOKEN_OFFSETS: fixed(*range(batch + 1)),
            names.SLOTS: self.tables.device_slots,
            names.ROWS: self.tables.device_rows,
            names.ROW_OFFSETS: self.tables.device_offsets,
            names.SCORE_QUERIES: fixed(-1)
            if bucket.scores
            else fixed(),  # -1 is nobody: of rows the last token's count
            names.PINNED: fixed(*[0] * batch),
            names.POOL_KEYS: store.keys,
            names.POOL_VALUES: store.values,
        }
        dims = {
            "T": batch,
            "F": 1,
            "B": batch,
            "B + 1": batch + 1,
            "N": bucket.capacity,
            "R": len(store.keys),
            "W": int(bucket.scores),
            "M": batch,
            names.SURVIVORS: batch,
        }
        bindings = engines.decoder_bindings
        taken = [each for each in (*bindings.inputs, *bindings.outputs) if each.name != names.SURVIVORS]
        self._buffers = Buffers(taken, dims, device, given)
        self._tokens = torch.empty(batch, dtype=torch.int64, device=device)
        outputs = {"logits": self._buffers[names.LOGITS], "tokens": self._tokens}
        outputs |= {"scores": self._buffers[names.ROW_SCORES]} if bucket.scores else {}
        self._outputs = outputs
        self._results = {
            name: accelerator.host_memory(tuple(output.shape), output.dtype) for name, output in outputs.items()
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
        buffers, stream = self._buffers, self._accelerator.stream()
        self._engines.decoder.run(STEP, buffers.dims, buffers.addresses, stream)
        torch.argmax(buffers[names.LOGITS], dim=-1, out=self._tokens)

    @property
    def tokens(self) -> list[int]:
        """The likeliest token of each place in the batch."""
        tokens: list[int] = self._results["tokens"].tolist()
        return tokens

    @property
    def logits(self) -> Tensor:
        """float32 ``[B, vocabulary]`` on the host, overwritten by the next step of this bucket."""
        return self._results["logits"]

    def scores(self, layer: int, sequence: int, format_: str) -> Tensor:
        """The weights of the rows of a format that one sequence read in a layer, in the order of its list: float32, on
        the host, overwritten by the next step of this bucket."""
        number = self.tables.list_of(sequence, format_)
        begin, end = self.tables.offsets[layer, number : number + 2]
        return self._results["scores"][layer, begin:end]
