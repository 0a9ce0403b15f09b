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
from ...kv.selection import ListedRows, Selection, StepScores, is_low_rank
from ...kv.shared_prefix import SharedPrefixCache
from ...kv.store import RowStore
from ...model.network import Llava
from ...request import Prompt
from ..prefill import Attention, Prefill
from ..stored import StoredRows

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
        self._score_type = np.float64 if model.dtype == torch.float64 else np.float32

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
        reads = [cache.rows_read_now for cache in caches]
        scores = [
            StepScores(read, self._score_type) if cache.wants_scores else None
            for cache, read in zip(caches, reads, strict=True)
        ]
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            if smoothings:
                query, key = smoothings[index].query(query), smoothings[index].keys(key)
            rows.append(caches, [each[index] for each in ids], key, value)
            for number, cache in enumerate(caches):
                if cache.picks_core:
                    scanned = rows.parts(ListedRows([[cache.rows_scanned_now]], index))
                    if scanned:
                        own = query[number : number + 1]
                        coarse = coarse_weights(own, scanned[0], self._kv_heads, self._scale)
                        cache.pick_core(index, coarse.numpy())
                    reads[number] = cache.rows_read_now
            hidden = layer.finish(hidden, self._attend_step(query, index, caches, reads, scores))
        for cache, own_scores in zip(caches, scores, strict=True):
            rows.move(cache, cache.settle(own_scores))
        return decoder.logits(hidden)

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
