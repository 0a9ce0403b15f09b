"""One decode step of one bucket: all its memory, what runs on the device, and what comes back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...attention.cuda import Bases, Kernels, Lists, Pool, Scan, Step, Workspace
from ...model.vision_language import VisionLanguageModel
from ..steps import Accelerator, Bucket, RecordedStep, StepTables


class DecodeStep(RecordedStep):
    """A step of the torch model. What the device runs touches only memory that is allocated here, the weights and the
    pool, and asks the host for nothing: it is recorded once and launched as a whole."""

    def __init__(
        self,
        model: VisionLanguageModel,
        kernels: Kernels,
        pool: Pool,
        accelerator: Accelerator,
        bucket: Bucket,
        splits: int,
        angles: Tensor | None = None,
    ) -> None:
        """``angles``: RoPE's by position (see :func:`rope_table`), for low-rank rows."""
        text, device = model.spec.text, accelerator.device
        self._model, self._kernels, self._pool, self._angles = model, kernels, pool, angles
        batch = bucket.batch
        self._workspace = Workspace.of(
            kernels.shape,
            batch,
            text.heads,
            splits,
            bucket.capacity,
            scores=bucket.scores,
            parts=len(bucket.formats),
            scanned=bucket.scanned,
            low_rank=bucket.rank > 0,
        )
        self._scratch = torch.empty(self._workspace.bytes, dtype=torch.uint8, device=device)
        self._attended = torch.empty(batch, text.heads, text.head_dim, dtype=model.dtype, device=device)
        outputs = {
            "logits": torch.empty(batch, text.vocab_size, dtype=model.dtype, device=device),
            "tokens": torch.empty(batch, dtype=torch.int64, device=device),
        }
        if bucket.scores:
            size = (text.layers, bucket.capacity)
            outputs["scores"] = torch.empty(size, dtype=torch.float32, device=device)
        if bucket.scanned:
            size = (text.layers, bucket.scanned)
            outputs["picked"] = torch.zeros(size, dtype=torch.int8, device=device)
            self._ends = torch.zeros(len(bucket.formats) * batch, dtype=torch.int32, device=device)
        scratch = (self._scratch, self._attended)
        super().__init__(accelerator, StepTables(accelerator, text.layers, bucket), outputs, scratch)

    def run(self) -> None:
        decoder, tables = self._model.decoder, self.tables
        hidden = decoder.embed(tables.device_tokens)
        angles = decoder.angles(tables.device_positions)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            self._attend(index, query.contiguous(), key.contiguous(), value.contiguous())
            hidden = layer.finish(hidden, self._attended)
        logits = self.outputs["logits"]
        logits.copy_(decoder.logits(hidden))
        torch.argmax(logits, dim=-1, out=self.outputs["tokens"])

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        tables, scores, bucket = self.tables, self.outputs.get("scores"), self.tables.bucket
        rows, offsets = address(tables.device_rows[layer]), address(tables.device_offsets[layer])
        lists = Lists.of(rows, offsets, bucket.batch, bucket.capacity, bucket.formats)
        scan = self._scan(layer) if bucket.scanned else None
        step = Step(
            query=address(query),
            new_keys=address(key),
            new_values=address(value),
            slots=address(tables.device_slots[layer]),
            lists=lists if scan is None else replace(lists, ends=address(self._ends)),
            out=address(self._attended),
            scores=0 if scores is None else address(scores[layer]),
            written=bucket.written,
            scan=scan,
            bases=self._bases(layer),
            smoothing=address(tables.device_smoothing[layer]) if bucket.smooths else 0,
        )
        stream = self._accelerator.stream()
        self._kernels.step(step, self._pool, self._workspace, address(self._scratch), stream)

    def _scan(self, layer: int) -> Scan:
        tables, bucket = self.tables, self.tables.bucket
        rows, offsets = address(tables.device_scanned[layer]), address(tables.device_of_scanned[layer])
        return Scan(
            lists=Lists.of(rows, offsets, bucket.batch, bucket.scanned, bucket.formats),
            formats=bucket.scanned_formats,
            limits=address(tables.device_limits),
            listed=address(tables.device_listed[layer]),
            picked=address(self.outputs["picked"][layer]),
        )

    def _bases(self, layer: int) -> Bases | None:
        if self._angles is None:
            return None
        ids, positions = self.tables.device_bases[layer], self.tables.device_row_positions[layer]
        return Bases(address(ids), self.tables.bucket.rank, address(positions), address(self._angles))


def rope_table(model: VisionLanguageModel, device: torch.device) -> Tensor:
    """The cosines and sines that the model rotates keys by, at every position: ``[context, 2, d / 2]``."""
    text = model.spec.text
    both = torch.cat(model.decoder.angles(torch.arange(text.context, device=device)), dim=1)
    return both[..., : text.head_dim // 2].contiguous()  # of each the halves of a head have the same


def address(tensor: Tensor) -> int:
    """Where a tensor's first element lies."""
    return int(tensor.data_ptr())
