"""Pictures, prompts and decode steps by a package's engines. ``TorchBackend`` is the oracle.

A prompt runs whole; its scores, keys and values of all layers come out together, the policy chooses, and torch writes
the chosen rows into the pool, in any format: so a prompt's full cache does exist for a moment, in the engine's outputs.
Of a question over a shared prefix only its own tokens run, over the prefix's rows. A decode step is one recorded run of
the engine. The plugin reads rows where they lie; see :mod:`avl_edge.backends.cuda` for what waits for what, which is
the same here.

Shown on a CPU: the whole path, with ONNX Runtime on the exported graphs in the engines' place. Left to a device: the
engines themselves, recording and replay, and the speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kv.cache import SequenceCache
from ...kv.pool import RowTable
from ...kv.selection import Selection, StepScores
from ...kv.store import RowStore
from ...machine.ledger import Entry
from ...model.network.image_features import ImageFeatures
from ...model.network.rope import Rope
from ...package.engine import PROMPT
from ...package.export import bindings as names
from ...request import PixelValues, Prompt
from ..base import ForwardTask, Layers, LayerTask, WholeTask
from ..step_batch import StepBatch, StepResult
from ..steps import Accelerator, Bucket, Reads, RecordedSteps
from ..stored import StoredRows, distances
from .engines import Buffers, Engines, parts_of
from .prompt import Listed, buffers, pruned_after, scores_of
from .runner import EngineFailed
from .step import EngineStep


class EngineBackend:
    """The ``Backend`` protocol over :class:`Engines`; features, rows and scratch memory lie on the accelerator's
    device, logits come back to the CPU. An error of the device shows at the next wait, as torch's RuntimeError.

    ``engines``, ``accelerator``, ``rows`` of the pool and recorded ``steps`` are there for traces and tests.
    """

    name = "tensorrt"

    def __init__(
        self, engines: Engines, store: RowStore, accelerator: Accelerator, recorded_steps: Entry | None = None
    ) -> None:
        """``store``: the pool, in the engines' dtype, on the accelerator's device. ``recorded_steps``: under which
        recorded steps are counted."""
        self.engines, self._store, self.accelerator = engines, store, accelerator
        text, device = engines.spec.text, accelerator.device
        with device:
            rope = Rope(text.head_dim, text.rope)
        self.rows = StoredRows(store, lambda positions: rope.angles(positions, store.keys.dtype))
        # One run at a time: all engines share the memory of the largest.
        runners = (engines.vision, engines.decoder)
        self._memory = torch.empty(max(each.memory_bytes for each in runners), dtype=torch.uint8, device=device)
        for each in runners:
            each.take_memory(self._memory.data_ptr())
        stream = accelerator.stream()
        self._vision, self._prompts = engines.vision.context(0, stream), engines.decoder.context(PROMPT, stream)
        self.steps = RecordedSteps(
            accelerator, lambda bucket: EngineStep(engines, store, accelerator, bucket), recorded_steps
        )

    @torch.inference_mode()
    def require_rows(self) -> None:
        """Run one step over a pool in which nobody has rows yet; :class:`~avl_edge.backends.tensorrt.EngineFailed`
        unless its new rows are there. TensorRT promises no plugin that an input is what was bound, and not a copy of
        it."""
        layers, store = self.engines.spec.text.layers, self._store
        slots = np.where(np.arange(layers) < len(store.keys), np.arange(layers), -1).astype(np.int32)
        reads = [Reads([Selection("exact", RowTable.of(slots[:, None], np.zeros((layers, 1), dtype=np.int32)))])]
        store.keys[:layers], store.values[:layers] = torch.nan, torch.nan  # not what an earlier check left there
        step = EngineStep(self.engines, store, self.accelerator, self._bucket(reads, False))
        step.tables.fill([0], [0], slots[:, None], reads)
        step.tables.upload()
        step.run()
        self.accelerator.synchronize()
        for layer in np.flatnonzero(slots >= 0).tolist():
            pairs = zip((store.keys[layer], store.values[layer]), step.row(layer), strict=True)
            if not all(torch.equal(row.view(torch.uint8), new.view(torch.uint8)) for row, new in pairs):
                raise EngineFailed(
                    f"layer {layer}'s new row is not in the pool: this TensorRT copies what its plugins write into; "
                    "use --device cuda, and report TensorRT's version"
                )

    def begin_encode(self, pictures: Sequence[PixelValues]) -> ForwardTask[ImageFeatures]:
        """As many pictures at once as the engine was built for; the features stay on the device."""
        return LayerTask(self._pictures(np.stack([each.values for each in pictures])))

    def _pictures(self, pixels: npt.NDArray[np.float32]) -> Layers[ImageFeatures]:
        most, encoded = self.engines.recipe.images, list[Tensor]()
        for at in range(0, len(pixels), most):
            if at:
                yield
            encoded.append(self._encode(pixels[at : at + most]))
        return ImageFeatures(torch.cat(encoded).flatten(0, 1))

    def _encode(self, pixels: npt.NDArray[np.float32]) -> Tensor:
        device, dims = self.accelerator.device, {"I": len(pixels)}
        given = {names.PIXELS: torch.from_numpy(np.ascontiguousarray(pixels)).to(device)}
        run = Buffers.of(self.engines.vision_bindings, dims, device, given)
        self._vision.run(dims, run.addresses, self.accelerator.stream())
        return run[names.FEATURES]

    def begin_prefill(
        self, prompt: Prompt, features: ImageFeatures | None, cache: SequenceCache
    ) -> ForwardTask[Tensor]:
        """A prompt runs whole; its logits, float32, and its rows are there when it is done."""
        return WholeTask(lambda: self._prompt(prompt, features, cache))

    def _prompt(self, prompt: Prompt, features: ImageFeatures | None, cache: SequenceCache) -> Tensor:
        logits = self._run(prompt, features, cache)[names.LOGITS][0]
        self.accelerator.synchronize()
        return logits

    def _run(self, prompt: Prompt, features: ImageFeatures | None, cache: SequenceCache) -> Buffers:
        """Run a prompt from the cache's ``begin`` on, and store what its policy chooses."""
        text = self.engines.spec.text
        listed, pruned = Listed(cache, text.layers), pruned_after(cache, text.layers)
        run = buffers(self.engines, self._store, prompt, features, cache, listed)
        self._prompts.run(run.dims, run.addresses, self.accelerator.stream())
        scores = scores_of(run, text, cache, listed)
        for layer in range(text.layers):
            keys, values = run[names.KEY.format(layer)], run[names.VALUE.format(layer)]
            stored = cache.store_prompt(layer, *scores[layer], self._distances(cache, layer, keys, values))
            before = listed.count(layer)
            own = [each.at(each.order - before) for each in stored]
            self.rows.store_prompt(cache, layer, own, keys, values)
            if pruned and layer == pruned.layer:
                cache.go_on(run[names.KEPT].cpu().numpy().astype(np.int64))
        return run

    def _distances(self, cache: SequenceCache, layer: int, keys: Tensor, values: Tensor) -> npt.NDArray[np.floating]:
        """Those of a layer's values, a question's behind its prefix's, whose rows are read for nothing else."""
        if cache.begin and cache.wants_distances:
            values = self.rows.after(cache, layer, keys, values)[1]
        return distances(values, cache, layer)

    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache], *, greedy: bool = False) -> StepResult:
        """One step for every sequence; greedy tokens are chosen on the device, logits, float32, stay there."""
        pieces = self._pieces(len(caches))
        return StepResult.joined([(some.start, self._decode(token_ids[some], caches[some], greedy)) for some in pieces])

    def _pieces(self, count: int) -> list[slice]:
        """As many sequences at a time as the engine was built for."""
        most = self.engines.recipe.sequences
        return [slice(at, at + most) for at in range(0, count, most)]

    @torch.inference_mode()
    def _decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache], greedy: bool) -> StepResult:
        batch = StepBatch(token_ids, caches)
        asked = batch.ask(
            lambda each: (
                Reads(each.rows_read_now, each.formats.text, smoothing=each.rows.smoothing),
                each.wants_scores,
            )
        )
        if not batch.caches:
            return batch.result()
        reads = [own for own, _ in asked]
        step = self.steps.of(self._bucket(reads, any(scores for _, scores in asked)))
        with self.steps.run(step, batch.token_ids, batch.positions, batch.slots, reads):
            for at, (_, scores) in enumerate(asked):
                if not scores:
                    batch.attempt(at, self._settle, batch.caches[at], None)
        for at, (own, scores) in enumerate(asked):
            if scores:
                batch.attempt(at, self._settle, batch.caches[at], step.scores(at, own))
        count = len(batch.caches)
        return batch.result(step.tokens[:count]) if greedy else batch.result(logits=step.logits(count))

    def _settle(self, cache: SequenceCache, scores: StepScores | None) -> None:
        self.rows.move(cache, cache.settle(scores))

    def _bucket(self, reads: Sequence[Reads], scores: bool) -> Bucket:
        """The smallest that the engine's sizes allow."""
        recipe, context = self.engines.recipe, self.engines.spec.text.context
        found = Bucket.of(reads, scores)
        batch, capacity = min(found.batch, recipe.sequences), min(found.capacity, recipe.sequences * context)
        # What formats are written is not asked, nor whose keys are smoothed: an engine's step has a place for each.
        formats = parts_of(found.formats)
        return replace(found, batch=batch, capacity=capacity, formats=formats, written=(), smooths=False)
