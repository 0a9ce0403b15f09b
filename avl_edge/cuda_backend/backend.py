"""The torch backend on a GPU. ``TorchBackend`` is the oracle: same policies, same cache, same order of events.

Rows lie in device memory, in the model's dtype (packed formats are for the CPU so far), and our kernels read them
there. What waits for what:

- Prefill: once per layer whose scores a policy asks for, since the policy chooses on the host which rows that layer
  stores; and once at its end, for the logits.
- Decode: once per step. The host knows all row lists before the step, as policies only change the next one. It fills
  one block of numbers; a copy, one graph launch and the copies back are queued together. While the device works, the
  policies of sequences that look at no scores settle; then the host waits once, for the tokens and, in a step whose
  scores somebody wants, the scores of all layers. No layer waits for the host, and nothing is copied per layer.
- Greedy tokens are chosen on the device (:meth:`CudaBackend.decode_greedy`); logits come back only where a sampler
  needs them (:meth:`CudaBackend.decode`).

A decode step is recorded once for each :class:`~avl_edge.cuda_backend.tables.Bucket` and replayed: the row lists and
their lengths are read from device memory, so that one recording serves any selection and every method. The numbers of
splits do not depend on the bucket; the matrix products may, as their library chooses another algorithm for another
batch, so that a sequence's last bits can change with its neighbours.

Shown on a CPU: the whole path on kernels by reference and by emulation, and that no operator of a step leaves the
device or waits. Left to a GPU, which this has not seen yet: recording and replay, and the speed; tools/gpu/check.py is
for that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache import Selected, SequenceCache
from ..config import require
from ..cuda import Kernels, KernelShape, Pool, PromptHeads
from ..kernels import attend_prompt
from ..models import Llava
from ..pool import RowStore
from ..request import Prompt
from ..stored import distances
from .device import Accelerator, CudaDevice
from .step import DecodeStep, address
from .tables import Bucket

_RECORDED = 12
"""Steps that are kept; each holds its tables and scratch memory, tens of MB for a 7B model and a large batch."""
_LOGITS_BYTES = 64 * 2**20
"""For the scores of a prompt, whose queries are taken in pieces that fit."""


class CudaBackend:
    """``encode_images``, ``prefill`` and ``decode`` on a GPU; what they give and take is the ``Backend`` protocol's.

    Logits come back to the CPU, where samplers are. Raises :class:`~avl_edge.errors.BadInput` for a request whose rows
    are packed, or whose method chooses rows within a step, by that step's own query (``coarse``). An error of the
    device shows at the next wait, as torch's RuntimeError.
    """

    def __init__(self, model: Llava, store: RowStore, kernels: Kernels, accelerator: Accelerator) -> None:
        """``model`` (see :func:`~avl_edge.cuda_backend.load_model`) and ``store`` lie on the accelerator's device, and
        ``kernels`` are those of their shape."""
        text, (keys, values) = model.spec.text, store.arenas("exact")
        self.name = f"torch-{accelerator.device.type}+kernels"
        self._model, self._kernels, self._accelerator = model, kernels, accelerator
        self._store = store  # whose memory the pool's addresses name
        self._pool = Pool(keys.data_ptr(), values.data_ptr(), text.kv_heads, *keys.stride()[:2], *values.stride()[:2])
        self._splits = kernels.splits(text.kv_heads, text.context)
        self._scale = text.head_dim**-0.5
        self._steps: OrderedDict[Bucket, DecodeStep] = OrderedDict()
        self._under_way = False

    @classmethod
    def on_gpu(cls, model: Llava, store: RowStore, accelerator: CudaDevice) -> CudaBackend:
        """With the kernels compiled for this model and GPU, or taken from the cache.

        Raises :class:`~avl_edge.errors.BadInput` for a model that they do not take: in float32, say.
        """
        text = model.spec.text
        dtype = str(model.dtype).removeprefix("torch.")
        shape = KernelShape.of(text.head_dim, text.heads, text.kv_heads, dtype)
        return cls(model, store, Kernels.load(shape, accelerator.device.index or 0), accelerator)

    @torch.inference_mode()
    def encode_images(self, pixels: npt.NDArray[np.float32]) -> Tensor:
        """The features stay on the device."""
        return self._model.encode_images(pixels)

    @torch.inference_mode()
    def prefill(self, prompt: Prompt, features: Tensor | None, cache: SequenceCache) -> Tensor:
        """The last token's logits ``[vocabulary]``, on the CPU."""
        _require_served(cache)
        decoder, device = self._model.decoder, self._accelerator.device
        hidden = self._model.embed(prompt.token_ids, prompt.spans, features)
        positions = torch.arange(len(prompt), device=device)
        angles = decoder.angles(positions)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            attended = attend_prompt(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), self._scale)
            attention = self._score(query.contiguous(), key.contiguous(), cache.prompt_queries(index))
            scores = (*attention, distances(value, cache, index))
            for stored in cache.store_prompt(index, *scores):
                self._write(stored, key.contiguous(), value.contiguous())
            attended = attended.transpose(0, 1)
            if index == len(decoder.layers) - 1:  # of the last layer only the last token is read
                hidden = layer.finish(hidden[-1:], attended[-1:])
                break
            hidden = layer.finish(hidden, attended)
            survivors = cache.prune_prompt(index, *scores)
            if survivors is not None:
                chosen = torch.from_numpy(survivors).to(device)
                hidden, positions = hidden[chosen], positions[chosen]
                angles = decoder.angles(positions)
        logits: Tensor = decoder.logits(hidden)[0].cpu()
        return logits

    def _score(
        self, query: Tensor, key: Tensor, queries: npt.NDArray[np.int64] | None
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        """Last and total attention ``[n]`` of query ``[n, H, d]`` on key ``[n, H_kv, d]``, on the host."""
        n, heads, dim = query.shape
        if queries is None:
            nothing = np.zeros(n, dtype=np.float32)
            return nothing, nothing
        device = query.device
        positions = torch.from_numpy(np.append(queries, n - 1).astype(np.int32)).to(device)
        piece = max(1, min(len(positions), _LOGITS_BYTES // (4 * heads * n)))
        scratch = torch.empty(self._kernels.prompt_workspace(n, heads, piece), dtype=torch.uint8, device=device)
        scores = torch.zeros(2, n, dtype=torch.float32, device=device)
        self._kernels.score_prompt(
            PromptHeads(address(query), heads * dim, dim),
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

    def _write(self, stored: Selected, key: Tensor, value: Tensor) -> None:
        """Put a prompt's chosen tokens into their rows, out of key and value ``[n, H_kv, d]``."""
        slots = np.full(len(key), -1, dtype=np.int32)
        slots[stored.places] = stored.ids
        on_device = torch.from_numpy(slots).to(key.device)
        stream = self._accelerator.stream()
        self._kernels.append(address(key), address(value), address(on_device), len(key), self._pool, stream)

    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> Tensor:
        """Logits ``[sequences, vocabulary]`` on the CPU, of one step for every sequence; they are the caller's."""
        step = self._decode(token_ids, caches, logits=True)
        return step.logits[: len(caches)].clone()

    def decode_greedy(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> list[int]:
        """As :meth:`decode`, but the likeliest token of each sequence, chosen on the device."""
        return self._decode(token_ids, caches, logits=False).tokens[: len(caches)]

    @torch.inference_mode()
    def _decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache], *, logits: bool) -> DecodeStep:
        if self._under_way:  # a step was interrupted: its copies may still read what is filled next
            self._accelerator.synchronize()
        layers = range(self._model.spec.text.layers)
        positions, slots = zip(*(cache.begin_step() for cache in caches), strict=True)
        rows = [[_all_rows(cache.rows_to_read(layer)) for cache in caches] for layer in layers]
        most = max(sum(map(len, of_layer)) for of_layer in rows)
        step = self._step(Bucket.of(len(caches), most, any(cache.wants_scores for cache in caches)))
        step.tables.fill(token_ids, positions, np.stack(slots, axis=1), rows)
        self._under_way = True
        step.start(logits=logits)
        for cache in caches:
            if not cache.wants_scores:
                for layer in layers:
                    cache.settle(layer, None)
        self._accelerator.synchronize()
        self._under_way = False
        for number, cache in enumerate(caches):
            if cache.wants_scores:
                for layer in layers:
                    cache.settle(layer, step.scores(layer, number))
        return step

    def _step(self, bucket: Bucket) -> DecodeStep:
        if bucket not in self._steps:
            if len(self._steps) >= _RECORDED:
                self._steps.popitem(last=False)
            self._steps[bucket] = DecodeStep(
                self._model, self._kernels, self._pool, self._accelerator, bucket, self._splits
            )
        self._steps.move_to_end(bucket)
        return self._steps[bucket]


def _require_served(cache: SequenceCache) -> None:
    """:class:`~avl_edge.errors.BadInput` for what a step here cannot do."""
    require(
        cache.formats.all_exact,
        "the GPU reads rows in the exact format only: leave the formats out, or use --device cpu",
    )
    require(
        not cache.picks_core,
        "the GPU does not choose rows within a step, as this method does: take another one, or use --device cpu",
    )


def _all_rows(selected: Sequence[Selected]) -> npt.NDArray[np.int32]:
    """The ids of rows of one format, which are all, in the order of their places."""
    (rows,) = selected
    return rows.ids
