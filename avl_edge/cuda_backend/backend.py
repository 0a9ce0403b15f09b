"""The torch backend on a GPU. ``TorchBackend`` is the oracle: same policies, same cache, same order of events.

Rows lie in device memory, exact or packed in int8 and int4, and our kernels read them there, several formats in one
softmax. What waits for what:

- Prefill: once per layer whose scores a policy asks for, since the policy chooses on the host which rows that layer
  stores; and once at its end, for the logits.
- Decode: once per step. The host knows all row lists before the step, as policies only change the next one. It fills
  one block of numbers; a copy, one graph launch and the copies back are queued together. While the device works, the
  policies of sequences that look at no scores settle; then the host waits once, for the tokens and, in a step whose
  scores somebody wants, the scores of all layers. No layer waits for the host, and nothing is copied per layer.
- A core that is picked within the step (``coarse``) is picked by the device, which lists the rows that it then attends;
  the host reads afterwards which they were.
- Rows that change their format, as a policy settles, are converted between two steps, by torch's operators.
- Greedy tokens are chosen on the device (:meth:`CudaBackend.decode_greedy`); logits come back only where a sampler
  needs them (:meth:`CudaBackend.decode`).

A decode step is recorded once for each :class:`~avl_edge.cuda_backend.tables.Bucket` and replayed: the row lists and
their lengths are read from device memory, so that one recording serves any selection and every method. Formats that no
sequence of the batch reads cost nothing: a step of exact rows launches what it would if there were no others. The
numbers of splits do not depend on the bucket; the matrix products may, as their library chooses another algorithm for
another batch, so that a sequence's last bits can change with its neighbours.

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
from ..config import Formats, require
from ..cuda import FORMATS, Kernels, KernelShape, Pool, PromptHeads
from ..kernels import attend_prompt
from ..models import Llava
from ..pool import RowStore
from ..request import Prompt
from ..stored import StoredRows, distances, in_order
from .device import Accelerator, CudaDevice
from .step import DecodeStep, address
from .tables import Bucket, Reads

_RECORDED = 12
"""Steps that are kept; each holds its tables and scratch memory, tens of MB for a 7B model and a large batch."""
_LOGITS_BYTES = 64 * 2**20
"""For the scores of a prompt, whose queries are taken in pieces that fit."""


class CudaBackend:
    """``encode_images``, ``prefill`` and ``decode`` on a GPU; what they give and take is the ``Backend`` protocol's.

    Logits come back to the CPU, where samplers are. Raises :class:`~avl_edge.errors.BadInput` for a request with rows
    in a format that :func:`is_served` does not know. An error of the device shows at the next wait, as torch's
    RuntimeError.
    """

    def __init__(self, model: Llava, store: RowStore, kernels: Kernels, accelerator: Accelerator) -> None:
        """``model`` (see :func:`~avl_edge.cuda_backend.load_model`) and ``store`` lie on the accelerator's device, and
        ``kernels`` are those of their shape."""
        text, (keys, values) = model.spec.text, store.arenas("exact")
        self.name = f"torch-{accelerator.device.type}+kernels"
        self._model, self._kernels, self._accelerator = model, kernels, accelerator
        self._rows = StoredRows(store, model.decoder.angles)  # the pool's addresses name the store's memory
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
        require_served(cache.formats)
        self._kernels.prepare(cache.formats.by_tier().values())
        decoder, device = self._model.decoder, self._accelerator.device
        hidden = self._model.embed(prompt.token_ids, prompt.spans, features)
        positions = torch.arange(len(prompt), device=device)
        angles = decoder.angles(positions)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            attended = attend_prompt(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), self._scale)
            attention = self._score(query.contiguous(), key.contiguous(), cache.prompt_queries(index))
            scores = (*attention, distances(value, cache, index))
            stored = cache.store_prompt(index, *scores)
            for each in stored:
                if each.format == "exact":
                    self._write(each, key.contiguous(), value.contiguous())
            self._rows.store_prompt(cache, index, [each for each in stored if each.format != "exact"], key, value)
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
        """Put a prompt's chosen tokens into their exact rows, out of key and value ``[n, H_kv, d]``."""
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
        reads = [_reads(cache, layers) for cache in caches]
        step = self._step(Bucket.of(reads, any(cache.wants_scores for cache in caches)))
        step.tables.fill(token_ids, positions, np.stack(slots, axis=1), reads)
        self._under_way = True
        step.start(logits=logits)
        for cache in caches:
            if not cache.wants_scores and not cache.picks_core:
                for layer in layers:
                    self._rows.move(cache, layer, cache.settle(layer, None))
        self._accelerator.synchronize()
        self._under_way = False
        for number, (cache, own) in enumerate(zip(caches, reads, strict=True)):
            if cache.wants_scores or cache.picks_core:
                for layer in layers:
                    self._settle(step, number, cache, own, layer)
        return step

    def _settle(self, step: DecodeStep, number: int, cache: SequenceCache, reads: Reads, layer: int) -> None:
        """What a sequence that waited for the step's results does with them in one layer."""
        if reads.looked:
            cache.set_core(layer, step.picked(layer, number, reads.looked[layer].format))
            cache.rows_to_read(layer)  # for its counts: which rows they are is known only now
        scores = None
        if cache.wants_scores:
            read = reads.rows[layer]
            scores = in_order(read, [step.scores(layer, number, each.format) for each in read])
        self._rows.move(cache, layer, cache.settle(layer, scores))

    def _step(self, bucket: Bucket) -> DecodeStep:
        if bucket not in self._steps:
            if len(self._steps) >= _RECORDED:
                self._steps.popitem(last=False)
            self._steps[bucket] = DecodeStep(
                self._model, self._kernels, self._pool, self._accelerator, bucket, self._splits
            )
        self._steps.move_to_end(bucket)
        return self._steps[bucket]


def is_served(formats: Formats) -> bool:
    """Whether the kernels read rows of these formats."""
    return FORMATS.keys() >= set(formats.by_tier().values())


def require_served(formats: Formats) -> None:
    """:class:`~avl_edge.errors.BadInput` for formats that the kernels do not read."""
    others = ", ".join(sorted(set(formats.by_tier().values()) - FORMATS.keys()))
    known = ", ".join(FORMATS)
    require(not others, f"the GPU reads rows in the formats {known}, not {others}: choose those, or --device cpu")


def _reads(cache: SequenceCache, layers: range) -> Reads:
    """What a sequence reads in the step that has begun."""
    looked = [cache.rows_to_look_at(layer)[0] for layer in layers] if cache.picks_core else []
    if not any(len(each.ids) for each in looked):  # of a text alone there is nothing to choose
        return Reads([cache.rows_to_read(layer) for layer in layers], cache.formats.text)
    share, most = cache.nucleus
    return Reads([[cache.text_rows(layer)] for layer in layers], cache.formats.text, looked, share, most)
