"""One decode step of one bucket: its memory, and the engine's run."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kv.store import RowStore
from ...package.engine import STEP
from ...package.export import bindings as names
from ..steps import Accelerator, Bucket, RecordedStep, StepTables
from .engines import Buffers, Engines, pool_dims, pool_of


class EngineStep(RecordedStep):
    """A step of the decoder's engine, all of whose inputs and outputs are allocated here, but for the pool.

    The bucket's formats are the first of those that the engine reads.
    """

    def __init__(self, engines: Engines, store: RowStore, accelerator: Accelerator, bucket: Bucket) -> None:
        text, device, batch = engines.spec.text, accelerator.device, bucket.batch
        self._context = engines.decoder.context(STEP, accelerator.stream())
        tables = StepTables(accelerator, text.layers, bucket, dense=True)

        def fixed(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        nobody = [-1]  # is enough for the last token's attention, and sums no other's
        given = {
            names.TOKEN_IDS: tables.device_tokens,
            names.FEATURES: torch.zeros(1, text.hidden_size, dtype=store.keys.dtype, device=device),
            names.FEATURE_ROWS: fixed(*[-1] * batch),
            names.POSITIONS: tables.device_positions,
            names.TOKEN_OFFSETS: fixed(*range(batch + 1)),
            names.SLOTS: tables.device_slots,
            names.ROWS: tables.device_rows,
            names.ROW_OFFSETS: tables.device_offsets,
            names.SMOOTHING: tables.device_smoothing,
            names.SCORE_QUERIES: fixed(*nobody) if bucket.scores else fixed(),
            names.PINNED: fixed(*[0] * batch),
            **pool_of(store),
        }
        parts = len(bucket.formats)
        dims = {
            **pool_dims(store),
            "T": batch,
            "P * T": parts * batch,
            "F": 1,
            "B": batch,
            "B + 1": batch + 1,
            "P * B + 1": parts * batch + 1,
            "N": bucket.capacity,
            "W": int(bucket.scores),
            "M": batch,
            names.SURVIVORS: batch,
        }
        bindings = engines.decoder_bindings
        taken = [each for each in (*bindings.inputs, *bindings.outputs) if each.name != names.SURVIVORS]
        self._buffers = Buffers(taken, dims, device, given)
        self._tokens = torch.empty(batch, dtype=torch.int64, device=device)
        outputs = {"logits": self._buffers[names.LOGITS], "tokens": self._tokens}
        outputs |= {"scores": self._buffers[names.ROW_SCORES][:, 0]} if bucket.scores else {}
        super().__init__(accelerator, tables, outputs, self._buffers.own)

    def run(self) -> None:
        buffers, stream = self._buffers, self._accelerator.stream()
        self._context.run(buffers.dims, buffers.addresses, stream)
        torch.argmax(buffers[names.LOGITS], dim=-1, out=self._tokens)

    def row(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value ``[H_kv, d]`` of the first sequence's new token."""
        return self._buffers[names.KEY.format(layer)][0], self._buffers[names.VALUE.format(layer)][0]
