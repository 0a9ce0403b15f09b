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
from ...kv.selection import is_low_rank
from ...kv.shared_prefix import SharedPrefixCache
from ...kv.store import RowStore
from ...model.network import Llava
from ...request import Prompt
from ..prefill import Attention, Prefill
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

    @torch.inference_mode()
    def encode_images(self, pixels: npt.NDArray[np.float32]) -> Tensor:
        return self.model.encode_images(pixels)

    def prefill(self, prompt: Prompt, features: Tensor | None, cache: SequenceCache) -> Tensor:
        return self._prefill.run(prompt, features, cache)

    def prefill_prefix(self, prompt: Prompt, features: Tensor | None, cache: SharedPrefixCache) -> None:
        self._prefill.run_prefix(prompt, features, cache)

    def _score(self, query: Tensor, key: Tensor, queries: Index) -> Attention:
        last, total = prompt_scores(query.transpose(0, 1), key.transpose(0, 1), torch.from_numpy(queries), self._scale)
        return last.numpy(), total.numpy()

    def decode_greedy(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> list[int]:
        tokens: list[int] = self.decode(token_ids, caches).argmax(-1).tolist()
        return tokens

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> Tensor:
        decoder, rows = self.model.decoder, self.rows
        positions, ids = zip(*(cache.begin_step() for cache in caches), strict=True)
        hidden = decoder.embed(torch.tensor(token_ids))
        angles, smoothings = decoder.angles(torch.tensor(positions)), rows.smoothings(caches)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            if smoothings:
                query, key = smoothings[index].query(query), smoothings[index].keys(key)
            rows.append(caches, [each[index] for each in ids], key, value)
            for number, cache in enumerate(caches):
                if cache.picks_core:
                    scanned = rows.parts([cache.rows_to_scan(index)])[0]
                    own = query[number : number + 1]
                    coarse = coarse_weights(own, scanned, self._kv_heads, self._scale)
                    cache.pick_core(index, coarse.numpy())
            attended, scores = self._attend_step(query, index, caches)
            hidden = layer.finish(hidden, attended)
            for cache, weights in zip(caches, scores, strict=True):
                rows.move(cache, [(index, cache.settle(index, weights))])
        return decoder.logits(hidden)

    def _attend_step(
        self, query: Tensor, layer: int, caches: Sequence[SequenceCache]
    ) -> tuple[Tensor, list[npt.NDArray[np.floating] | None]]:
        """A layer's attention ``[B, H, d]``, and each sequence's scores in the order of the rows that it reads, where
        its policy wants them."""
        read = [cache.rows_to_read(layer) for cache in caches]
        wants = [cache.wants_scores for cache in caches]
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
