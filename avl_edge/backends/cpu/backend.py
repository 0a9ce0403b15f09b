"""The torch backend on the CPU: the oracle that every other backend has to agree with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...attention import native
from ...attention.kernels import attend_parts, coarse_weights, prompt_scores
from ...kv.cache import SequenceCache
from ...kv.pool.rows import Index
from ...kv.selection import Selected, is_low_rank
from ...kv.store import RowStore
from ...model.network import Llava
from ...request import Prompt
from ..base import ForwardTask, LayerTask
from ..prefill import Attention, Prefill
from ..step_batch import StepBatch, StepResult
from ..stored import StoredRows, in_order, own_scores

Attend = Callable[..., tuple[Tensor, Sequence[Tensor] | None]]


class TorchBackend:
    """The CPU path: torch, and the native attention kernel where it was built.

    ``model`` is the network that it runs, ``rows`` are those of the pool: for traces and tests.
    """

    def __init__(self, model: Llava, store: RowStore, attend: Attend = attend_parts) -> None:
        """``attend`` computes the decode attention; its contract is
        :func:`avl_edge.attention.kernels.attend_parts`'s."""
        self.model = model
        self.rows = StoredRows(store, model.decoder.angles)
        self._prefill = Prefill(model, self.rows, self._score)
        self._attend = attend
        self.name = "torch-cpu+native" if native.available() else "torch-cpu"
        self._kv_heads = model.spec.text.kv_heads
        self._scale = model.spec.text.head_dim**-0.5

    @classmethod
    def with_pages(cls, model: Llava, pages: int, attend: Attend = attend_parts) -> TorchBackend:
        """Over a new store of so many pages."""
        shape = model.spec.text.kv_shape(model.dtype.itemsize)
        return cls(model, RowStore(pages, shape, model.dtype), attend)

    def begin_encode(self, pixels: npt.NDArray[np.float32]) -> ForwardTask:
        return LayerTask(self.model.encode(pixels))

    def begin_prefill(self, prompt: Prompt, features: Tensor | None, cache: SequenceCache) -> ForwardTask:
        return LayerTask(self._prefill.run(prompt, features, cache))

    def _score(self, query: Tensor, key: Tensor, queries: Index) -> Attention:
        last, total = prompt_scores(query.transpose(0, 1), key.transpose(0, 1), torch.from_numpy(queries), self._scale)
        return last.numpy(), total.numpy()

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache], *, greedy: bool = False) -> StepResult:
        decoder, rows, batch = self.model.decoder, self.rows, StepBatch(token_ids, caches)
        wants = batch.ask(lambda cache: (cache.picks_core, cache.wants_scores))
        if not batch.caches:
            return batch.result()
        hidden = decoder.embed(torch.tensor(batch.token_ids))
        angles, smoothings = decoder.angles(torch.tensor(batch.positions)), rows.smoothings(batch.caches)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            if smoothings:
                query, key = smoothings[index].query(query), smoothings[index].keys(key)
            rows.append(batch.caches, [each[index] for each in batch.slots], key, value)
            for at, (picks_core, _) in enumerate(wants):
                if picks_core:
                    batch.attempt(at, self._pick_core, batch.caches[at], index, query[at : at + 1])
            read = [self._read(batch, at, index) for at in range(len(wants))]
            attended, scores = self._attend_step(query, index, batch.caches, read, [scores for _, scores in wants])
            hidden = layer.finish(hidden, attended)
            for at, (cache, weights) in enumerate(zip(batch.caches, scores, strict=True)):
                batch.attempt(at, self._settle, cache, index, weights)
        logits = decoder.logits(hidden)
        return batch.result(tokens=logits.argmax(-1).tolist()) if greedy else batch.result(logits=logits)

    def _pick_core(self, cache: SequenceCache, layer: int, query: Tensor) -> None:
        scanned = self.rows.parts([cache.rows_to_scan(layer)])[0]
        cache.pick_core(layer, coarse_weights(query, scanned, self._kv_heads, self._scale).numpy())

    def _settle(self, cache: SequenceCache, layer: int, scores: npt.NDArray[np.floating] | None) -> None:
        self.rows.move(cache, [(layer, cache.settle(layer, scores))])

    @staticmethod
    def _read(batch: StepBatch, at: int, layer: int) -> Sequence[Selected]:
        """The rows that a sequence reads; of one that has failed the new token's own, so that the batch stays whole."""
        cache = batch.caches[at]
        read = batch.attempt(at, cache.rows_to_read, layer)
        if read is not None:
            return read
        position = np.array([batch.positions[at]], dtype=np.int32)
        own = Selected(cache.formats.text, np.zeros(1, np.int64), batch.slots[at][layer : layer + 1], position)
        return [own]

    def _attend_step(
        self,
        query: Tensor,
        layer: int,
        caches: Sequence[SequenceCache],
        read: Sequence[Sequence[Selected]],
        wants: Sequence[bool],
    ) -> tuple[Tensor, list[npt.NDArray[np.floating] | None]]:
        """A layer's attention ``[B, H, d]`` over what each sequence reads, and, where its policy wants them, its scores
        in the order of these rows."""
        scores: list[npt.NDArray[np.floating] | None] = [None] * len(caches)
        low = [number for number, selected in enumerate(read) if any(map(is_low_rank, selected))]
        batch = [number for number in range(len(caches)) if number not in low]
        attended = torch.empty_like(query)
        if batch:
            parts = self.rows.parts([read[number] for number in batch])
            wanted = any(wants[number] for number in batch)
            own = query if len(batch) == len(caches) else query[batch]
            out, weights = self._attend(own, parts, self._kv_heads, self._scale, scores=wanted)
            attended = out if len(batch) == len(caches) else attended.index_copy(0, torch.tensor(batch), out)
            for place, number in enumerate(batch):
                if weights is not None and wants[number]:
                    scores[number] = own_scores(place, read[number], parts, weights)
        for number in low:
            attended[number], low_weights = self.rows.attend(
                caches[number], layer, read[number], query[number], self._scale
            )
            if wants[number]:
                scores[number] = in_order(read[number], low_weights)
        return attended, scores
