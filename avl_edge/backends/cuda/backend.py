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
- Greedy tokens are chosen on the device (:meth:`CudaBackend.decode_greedy`); logits come back only where a sampler
  needs them (:meth:`CudaBackend.decode`).

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
import numpy.typing as npt
import torch
from torch import Tensor

from ...attention.cuda import Kernels, KernelShape, Pool, PromptHeads
from ...kv.cache import SequenceCache
from ...kv.pool.rows import Index
from ...kv.shared_prefix import SharedPrefixCache
from ...kv.store import RowStore
from ...model.network import Llava
from ...model.spec import TextSpec
from ...request import Prompt
from ..prefill import Attention, Prefill
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
    """``encode_images``, ``prefill``, ``prefill_prefix`` and ``decode`` on a GPU; what they give and take is the
    ``Backend`` protocol's.

    Logits come back to the CPU, where samplers are. An error of the device shows at the next wait, as torch's
    RuntimeError. ``rows`` are those of the pool, ``steps`` what was recorded: for traces and tests.
    """

    def __init__(self, model: Llava, store: RowStore, kernels: Kernels, accelerator: Accelerator) -> None:
        """``model`` (see :func:`~avl_edge.backends.cuda.load_model`) and ``store`` lie on the accelerator's device, and
        ``kernels`` are those of their shape."""
        text, (keys, values) = model.spec.text, store.arenas("exact")
        self.name = f"torch-{accelerator.device.type}+kernels"
        self._model, self._kernels, self._accelerator = model, kernels, accelerator
        self.rows = StoredRows(store, model.decoder.angles)  # the pool's addresses name the store's memory
        self._prefill = Prefill(model, self.rows, self._score)
        self._pool = Pool(keys.data_ptr(), values.data_ptr(), text.kv_heads, *keys.stride()[:2], *values.stride()[:2])
        self._splits = kernels.splits(text.kv_heads, text.context)
        self.steps = RecordedSteps(accelerator, self._new_step)

    @classmethod
    def on_gpu(cls, model: Llava, store: RowStore, accelerator: CudaDevice) -> CudaBackend:
        """With the kernels compiled for this model and GPU, or taken from the cache.

        Raises as :func:`kernel_shape`.
        """
        shape = kernel_shape(model.spec.text, model.dtype)
        return cls(model, store, Kernels.load(shape, accelerator.device.index or 0), accelerator)

    def _new_step(self, bucket: Bucket) -> DecodeStep:
        angles = self._angles if bucket.rank else None
        return DecodeStep(self._model, self._kernels, self._pool, self._accelerator, bucket, self._splits, angles)

    @cached_property
    def _angles(self) -> Tensor:
        return rope_table(self._model, self._accelerator.device)

    @torch.inference_mode()
    def encode_images(self, pixels: npt.NDArray[np.float32]) -> Tensor:
        """The features stay on the device."""
        return self._model.encode_images(pixels)

    def prefill(self, prompt: Prompt, features: Tensor | None, cache: SequenceCache) -> Tensor:
        """The last token's logits ``[vocabulary]``, on the CPU."""
        self._kernels.prepare(cache.formats.by_tier().values())
        return self._prefill.run(prompt, features, cache).cpu()

    def prefill_prefix(self, prompt: Prompt, features: Tensor | None, cache: SharedPrefixCache) -> None:
        """Leave a picture's rows in ``cache`` for questions about it; they are there when this returns."""
        self._kernels.prepare(cache.formats.by_tier().values())
        self._prefill.run_prefix(prompt, features, cache)
        self._accelerator.synchronize()

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

    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> Tensor:
        """Logits ``[sequences, vocabulary]`` on the CPU, of one step for every sequence; they are the caller's."""
        step = self._decode(token_ids, caches, logits=True)
        return step.logits[: len(caches)].clone()

    def decode_greedy(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> list[int]:
        """As :meth:`decode`, but the likeliest token of each sequence, chosen on the device."""
        return self._decode(token_ids, caches, logits=False).tokens[: len(caches)]

    @torch.inference_mode()
    def _decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache], *, logits: bool) -> DecodeStep:
        positions, slots = zip(*(cache.begin_step() for cache in caches), strict=True)
        reads = [_reads(cache) for cache in caches]
        step = self.steps.of(Bucket.of(reads, any(cache.wants_scores for cache in caches)))
        with self.steps.run(step, token_ids, positions, slots, reads, logits=logits):
            for cache in caches:
                if not cache.wants_scores and not cache.picks_core:
                    self.rows.move(cache, cache.settle(None))
        for number, (cache, own) in enumerate(zip(caches, reads, strict=True)):
            if own.scanned:
                cache.set_core(step.picked(number, own.scanned))
            if cache.wants_scores or cache.picks_core:
                self.rows.move(cache, cache.settle(step.scores(number, own) if cache.wants_scores else None))
        return step


def _reads(cache: SequenceCache) -> Reads:
    """What a sequence reads in the step that has begun."""
    text, smoothing = cache.formats.text, cache.rows.smoothing
    if cache.picks_core and cache.rows_scanned_now.counts.any():  # of a text alone there is nothing to choose
        share, most = cache.nucleus
        return Reads([cache.text_rows], text, cache.rows_scanned_now, share, most, smoothing=smoothing)
    basis = [rows.basis for rows in cache.rows.layers]
    return Reads(cache.rows_read_now, text, basis=basis, smoothing=smoothing)
