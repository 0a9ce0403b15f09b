"""The torch backend on a GPU. ``TorchBackend`` is the oracle: same policies, same cache, same order of events.

Rows lie in device memory. Our kernels read them there, exact, packed or low-rank, several formats in one softmax. What
waits for what:

- Prefill: once per layer whose scores a policy asks for, since the policy chooses on the host which rows that layer
  stores, or for which a low-rank basis is fitted; and once at its end, for the logits. A shared prefix likewise.
- Decode: once per step. The host knows all row lists before the step, as policies only change the next one. It fills
  one block of numbers; a copy, one graph launch and the copies back are queued together. While the device works, the
  policies of sequences that look at no scores settle; then the host waits once, for the tokens and, in a step whose
  scores somebody wants, the scores of all layers. No layer waits for the host, and nothing is copied per layer.
- A core that is picked within the step (``coarse``) is picked by the device, which lists the rows that it then attends;
  the host reads afterwards which they were.
- Rows that change their format, as a policy settles, are converted between two steps by torch's operators, those of
  several layers together.
- Logits stay on the device: tokens of a greedy step are chosen within it, and samplers work where the logits lie.

A decode step is recorded once for each :class:`~avl_edge.backends.steps.Bucket` and replayed: the row lists and
their lengths are read from device memory, so that one recording serves any selection and every method. Formats that no
sequence of the batch reads cost nothing: a step of exact rows launches what it would if there were no others. The
numbers of splits do not depend on the bucket; the matrix products may, as their library chooses another algorithm for
another batch, so that a sequence's last bits can change with its neighbours.

Shown on a CPU: the whole path on kernels by reference and by emulation, and that no operator of a step leaves the
device or waits. Left to a GPU, which this has not seen yet: recording and replay, and the speed; tools/gpu/check.py is
for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...attention.cuda import Kernels, KernelShape, Pool, PromptHeads
from ...kv.cache import SequenceCache
from ...kv.pool.rows import Index
from ...kv.selection import StepScores
from ...kv.store import RowStore
from ...machine.ledger import Entry
from ...model.network.image_features import ImageFeatures
from ...model.spec import TextSpec
from ...model.vision_language import VisionLanguageModel
from ...request import PixelValues, Prompt
from ..base import ForwardTask, Layers, LayerTask
from ..prefill import Attention, Prefill
from ..step_batch import StepBatch, StepResult
from ..steps import Accelerator, Bucket, CudaDevice, Reads, RecordedSteps
from ..stored import StoredRows
from .step import DecodeStep, address, rope_table

LOGITS_BYTES = 64 * 2**20
"""For the scores of a prompt, whose queries are taken in pieces that fit."""


def kernel_shape(text: TextSpec, dtype: torch.dtype) -> KernelShape:
    """That of the kernels for a decoder; :class:`~avl_edge.errors.BadInput` for one that they do not take: in float32,
    say."""
    return KernelShape.of(text.head_dim, text.heads, text.kv_heads, str(dtype).removeprefix("torch."))


class CudaBackend:
    """The ``Backend`` protocol on a GPU, pictures and prompts layer by layer.

    An error of the device shows at the next wait, as torch's
    RuntimeError. ``rows`` are those of the pool, ``steps`` what was recorded: for traces and tests.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        store: RowStore,
        kernels: Kernels,
        accelerator: Accelerator,
        recorded_steps: Entry | None = None,
    ) -> None:
        """``model`` (see :func:`~avl_edge.backends.cuda.load_model`) and ``store`` lie on the accelerator's device, and
        ``kernels`` are those of their shape. ``recorded_steps``: under which recorded steps are counted."""
        text, (keys, values) = model.spec.text, store.arenas("exact")
        self.name = f"torch-{accelerator.device.type}+kernels"
        self._model, self._kernels, self._accelerator = model, kernels, accelerator
        self.rows = StoredRows(store, model.decoder.angles)  # the pool's addresses name the store's memory
        self._prefill = Prefill(model, self.rows, self._score)
        self._pool = Pool(keys.data_ptr(), values.data_ptr(), text.kv_heads, *keys.stride()[:2], *values.stride()[:2])
        self._splits = kernels.splits(text.kv_heads, text.context)
        self.steps = RecordedSteps(accelerator, self._new_step, recorded_steps)

    @classmethod
    def on_gpu(
        cls, model: VisionLanguageModel, store: RowStore, accelerator: CudaDevice, recorded_steps: Entry | None = None
    ) -> CudaBackend:
        """With the kernels compiled for this model and GPU, or taken from the cache.

        Raises as :func:`kernel_shape`.
        """
        shape = kernel_shape(model.spec.text, model.dtype)
        kernels = Kernels.load(shape, accelerator.device.index or 0)
        return cls(model, store, kernels, accelerator, recorded_steps)

    def _new_step(self, bucket: Bucket) -> DecodeStep:
        angles = self._angles if bucket.rank else None
        return DecodeStep(self._model, self._kernels, self._pool, self._accelerator, bucket, self._splits, angles)

    @cached_property
    def _angles(self) -> Tensor:
        return rope_table(self._model, self._accelerator.device)

    def begin_encode(self, pictures: Sequence[PixelValues]) -> ForwardTask[ImageFeatures]:
        """The features stay on the device."""
        return LayerTask(self._model.encode(pictures))

    def begin_prefill(
        self, prompt: Prompt, features: ImageFeatures | None, cache: SequenceCache
    ) -> ForwardTask[Tensor]:
        """Logits and rows are there when the last layer is done."""
        self._kernels.prepare(cache.formats.by_tier().values())
        return LayerTask(self._prompt(prompt, features, cache))

    def _prompt(self, prompt: Prompt, features: ImageFeatures | None, cache: SequenceCache) -> Layers[Tensor]:
        last = yield from self._prefill.run(prompt, features, cache)
        self._accelerator.synchronize()
        return last

    def _score(self, query: Tensor, key: Tensor, queries: Index) -> Attention:
        query, key = query.contiguous(), key.contiguous()
        (w, heads, dim), n, device = query.shape, len(key), query.device
        positions = torch.from_numpy(np.append(queries, n - 1).astype(np.int32)).to(device)
        piece = max(1, min(len(positions), LOGITS_BYTES // (4 * heads * n)))
        scratch = torch.empty(self._kernels.prompt_workspace(n, heads, piece), dtype=torch.uint8, device=device)
        scores = torch.zeros(2, n, dtype=torch.float32, device=device)
        before = (
            (n - w) * heads * dim * query.itemsize
        )  # of the tokens of a shared prefix, whose queries nobody asks for
        self._kernels.score_prompt(
            PromptHeads(address(query) - before, heads * dim, dim),
            PromptHeads(address(key), key.shape[1] * dim, dim),
            key.shape[1],
            address(positions),
            n,
            len(positions),
            address(scores[0]),
            address(scores[1]),
            address(scratch),
            piece,
            self._accelerator.stream(),
        )
        last, total = scores.cpu().numpy()
        return last, total

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache], *, greedy: bool = False) -> StepResult:
        """One step for every sequence; greedy tokens are chosen on the device, logits stay there."""
        batch = StepBatch(token_ids, caches)
        asked = batch.ask(lambda cache: (_reads(cache), cache.wants_scores, cache.picks_core))
        if not batch.caches:
            return batch.result()
        reads = [own for own, _, _ in asked]
        step = self.steps.of(Bucket.of(reads, any(scores for _, scores, _ in asked)))
        with self.steps.run(step, batch.token_ids, batch.positions, batch.slots, reads):
            for at, (_, scores, picks_core) in enumerate(asked):
                if not scores and not picks_core:
                    batch.attempt(at, self._settle, batch.caches[at])
        for at, (own, scores, picks_core) in enumerate(asked):
            if scores or picks_core:
                batch.attempt(at, self._settle_by, step, at, batch.caches[at], own)
        count = len(batch.caches)
        return batch.result(step.tokens[:count]) if greedy else batch.result(logits=step.logits(count))

    def _settle(self, cache: SequenceCache, scores: StepScores | None = None) -> None:
        self.rows.move(cache, cache.settle(scores))

    def _settle_by(self, step: DecodeStep, number: int, cache: SequenceCache, own: Reads) -> None:
        """The same for a sequence that waited for the step's results."""
        if own.scanned:
            cache.set_core(step.picked(number, own.scanned))
        self._settle(cache, step.scores(number, own) if cache.wants_scores else None)


def _reads(cache: SequenceCache) -> Reads:
    """What a sequence reads in the step that has begun."""
    text, smoothing = cache.formats.text, cache.rows.smoothing
    if cache.picks_core and cache.rows_scanned_now.counts.any():  # of a text alone there is nothing to choose
        share, most = cache.nucleus
        return Reads([cache.text_rows], text, cache.rows_scanned_now, share, most, smoothing=smoothing)
    basis = [rows.basis for rows in cache.rows.layers]
    return Reads(cache.rows_read_now, text, basis=basis, smoothing=smoothing)
