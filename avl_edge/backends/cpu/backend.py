"""The torch backend on the CPU: the oracle that every other backend has to agree with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...attention import native
from ...attention.kernels import attend_parts, coarse_weights, prompt_scores
from ...kv.cache import SequenceCache
from ...kv.pool.rows import Index
from ...kv.selection import ListedRows, Selection, StepScores, is_low_rank
from ...kv.store import RowStore
from ...model.network.image_features import ImageFeatures
from ...model.vision_language import VisionLanguageModel
from ...request import PixelValues, Prompt
from ..base import ForwardTask, LayerTask
from ..prefill import Attention, Prefill
from ..step_batch import StepBatch, StepResult
from ..stored import StoredRows

Attend = Callable[..., tuple[Tensor, Sequence[Tensor] | None]]
Asked = tuple[bool, bool, list[Selection]]
"""Of a sequence, before its step: whether it picks its core, whether it wants scores, and what it reads."""


class TorchBackend:
    """The CPU path: torch, and the native attention kernel where it was built.

    ``model`` is the network that it runs, ``rows`` are those of the pool: for traces and tests.
    """

    def __init__(self, model: VisionLanguageModel, store: RowStore, attend: Attend = attend_parts) -> None:
        """``attend`` computes the decode attention; its contract is
        :func:`avl_edge.attention.kernels.attend_parts`'s."""
        self.model = model
        self.rows = StoredRows(store, model.decoder.angles)
        self._prefill = Prefill(model, self.rows, self._score)
        self._attend = attend
        self.name = "torch-cpu+native" if native.available() else "torch-cpu"
        self._kv_heads = model.spec.text.kv_heads
        self._scale = model.spec.text.head_dim**-0.5
        self._score_type = np.float64 if model.dtype == torch.float64 else np.float32

    @classmethod
    def with_pages(cls, model: VisionLanguageModel, pages: int, attend: Attend = attend_parts) -> TorchBackend:
        """Over a new store of so many pages."""
        shape = model.spec.text.kv_shape(model.dtype.itemsize)
        return cls(model, RowStore(pages, shape, model.dtype), attend)

    def begin_encode(self, pictures: Sequence[PixelValues]) -> ForwardTask[ImageFeatures]:
        return LayerTask(self.model.encode(pictures))

    def begin_prefill(
        self, prompt: Prompt, features: ImageFeatures | None, cache: SequenceCache
    ) -> ForwardTask[Tensor]:
        return LayerTask(self._prefill.run(prompt, features, cache))

    def _score(self, query: Tensor, key: Tensor, queries: Index) -> Attention:
        last, total = prompt_scores(query.transpose(0, 1), key.transpose(0, 1), torch.from_numpy(queries), self._scale)
        return last.numpy(), total.numpy()

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache], *, greedy: bool = False) -> StepResult:
        batch = StepBatch(token_ids, caches)
        asked = batch.ask(lambda cache: (cache.picks_core, cache.wants_scores, cache.rows_read_now))
        return self._decode(batch, asked, greedy=greedy) if batch.caches else batch.result()

    def _decode(self, batch: StepBatch, asked: Sequence[Asked], *, greedy: bool) -> StepResult:
        """A step that has begun."""
        decoder, rows = self.model.decoder, self.rows
        reads = [read for _, _, read in asked]
        scores = [StepScores(read, self._score_type) if wanted else None for _, wanted, read in asked]
        hidden = decoder.embed(torch.tensor(batch.token_ids))
        angles, smoothings = decoder.angles(torch.tensor(batch.positions)), rows.smoothings(batch.caches)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            if smoothings:
                query, key = smoothings[index].query(query), smoothings[index].keys(key)
            rows.append(batch.caches, [each[index] for each in batch.slots], key, value)
            for at, (picks_core, _, _) in enumerate(asked):
                if picks_core:
                    # Of one that has failed the rows of before, so that the batch stays whole.
                    picked = batch.attempt(at, self._pick_core, batch.caches[at], index, query[at : at + 1])
                    reads[at] = picked or reads[at]
            hidden = layer.finish(hidden, self._attend_step(query, index, batch.caches, reads, scores))
        for at, (cache, own_scores) in enumerate(zip(batch.caches, scores, strict=True)):
            batch.attempt(at, self._settle, cache, own_scores)
        logits = decoder.logits(hidden)
        return batch.result(tokens=logits.argmax(-1).tolist()) if greedy else batch.result(logits=logits)

    def _pick_core(self, cache: SequenceCache, layer: int, query: Tensor) -> list[Selection]:
        """The rows that a sequence reads in this layer, once the layer's core is picked."""
        scanned = self.rows.parts(ListedRows([[cache.rows_scanned_now]], layer))
        if scanned:
            cache.pick_core(layer, coarse_weights(query, scanned[0], self._kv_heads, self._scale).numpy())
        return cache.rows_read_now

    def _settle(self, cache: SequenceCache, scores: StepScores | None) -> None:
        self.rows.move(cache, cache.settle(scores))

    def _attend_step(
        self,
        query: Tensor,
        layer: int,
        caches: Sequence[SequenceCache],
        reads: Sequence[Sequence[Selection]],
        scores: Sequence[StepScores | None],
    ) -> Tensor:
        """A layer's attention ``[B, H, d]`` over the rows that the caches read; gives their ``scores``."""
        low = [number for number, read in enumerate(reads) if any(map(is_low_rank, read))]
        batch = [number for number in range(len(caches)) if number not in low]
        attended = torch.empty_like(query)
        if batch:
            listed = ListedRows([reads[number] for number in batch], layer)
            wanted = any(scores[number] is not None for number in batch)
            own = query if len(batch) == len(caches) else query[batch]
            out, weights = self._attend(own, self.rows.parts(listed), self._kv_heads, self._scale, scores=wanted)
            attended = out if len(batch) == len(caches) else attended.index_copy(0, torch.tensor(batch), out)
            if weights is not None:
                every = torch.cat(list(weights)).numpy()
                for place, number in enumerate(batch):
                    if (into := scores[number]) is not None:
                        listed.give(into, place, every)
        for number in low:
            selected = caches[number].rows_to_read(layer)
            out, low_weights = self.rows.attend(caches[number], layer, selected, query[number], self._scale)
            attended[number] = out
            if (into := scores[number]) is not None:
                ListedRows([reads[number]], layer).give(into, 0, torch.cat(low_weights).numpy())
        return attended
