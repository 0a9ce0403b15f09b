"""Where the numbers are computed: images to features, a prompt to rows, a step to logits.

``TorchBackend`` on the CPU is the oracle that every other backend has to agree with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import native
from .cache import SequenceCache
from .kernels import attend, attend_prompt, prompt_scores
from .models import Llava
from .pool import RowStore
from .request import Prompt


class Backend(Protocol):
    """What the runtime asks of a device."""

    name: str

    def encode_images(self, pixels: npt.NDArray[np.float32]) -> Tensor:
        """float32 ``[images, 3, H, W]`` to features ``[images, tokens, hidden]``."""
        ...

    def prefill(self, prompt: Prompt, features: Tensor | None, cache: SequenceCache) -> Tensor:
        """Run the prompt, leave in ``cache`` what its policy stores; the last token's logits ``[vocabulary]``."""
        ...

    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> Tensor:
        """One step for every sequence: its newest token in, logits ``[sequences, vocabulary]`` out."""
        ...


class TorchBackend:
    """The CPU path: torch, and the native attention kernel where it was built."""

    def __init__(
        self, model: Llava, store: RowStore, attend: Callable[..., tuple[Tensor, Tensor | None]] = attend
    ) -> None:
        """``attend`` computes the decode attention; its contract is :func:`avl_edge.kernels.attend`'s."""
        self._model = model
        self._store = store
        self._attend = attend
        self.name = "torch-cpu+native" if native.available() else "torch-cpu"
        self._scale = model.spec.text.head_dim**-0.5

    @torch.inference_mode()
    def encode_images(self, pixels: npt.NDArray[np.float32]) -> Tensor:
        return self._model.encode_images(pixels)

    @torch.inference_mode()
    def prefill(self, prompt: Prompt, features: Tensor | None, cache: SequenceCache) -> Tensor:
        decoder = self._model.decoder
        hidden = self._model.embed(prompt.token_ids, prompt.spans, features)
        positions = torch.arange(len(prompt))
        angles = decoder.angles(positions)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            attended = attend_prompt(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), self._scale)
            last, total = self._score(query, key, cache.prompt_queries(index))
            chosen, ids = cache.store_prompt(index, last, total)
            self._write(ids, key[chosen], value[chosen])
            attended = attended.transpose(0, 1)
            if index == len(decoder.layers) - 1:  # of the last layer only the last token is read
                hidden = layer.finish(hidden[-1:], attended[-1:])
                break
            hidden = layer.finish(hidden, attended)
            survivors = cache.prune_prompt(index, last, total)
            if survivors is not None:
                hidden, positions = hidden[survivors], positions[survivors]
                angles = decoder.angles(positions)
        return decoder.logits(hidden)[0]

    def _score(
        self, query: Tensor, key: Tensor, queries: npt.NDArray[np.int64] | None
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        if queries is None:
            nothing = np.zeros(len(query), dtype=np.float32)
            return nothing, nothing
        last, total = prompt_scores(query.transpose(0, 1), key.transpose(0, 1), torch.from_numpy(queries), self._scale)
        return last.numpy(), total.numpy()

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> Tensor:
        decoder = self._model.decoder
        positions, ids = zip(*(cache.begin_step() for cache in caches), strict=True)
        new_rows = np.stack(ids, axis=1)
        hidden = decoder.embed(torch.tensor(token_ids))
        angles = decoder.angles(torch.tensor(positions))
        wants_scores = any(cache.wants_scores for cache in caches)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            self._write(new_rows[index], key, value)
            rows = [cache.ids_to_read(index) for cache in caches]
            offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
            attended, scores = self._attend(
                query,
                self._store.keys,
                self._store.values,
                torch.from_numpy(np.concatenate(rows)),
                torch.from_numpy(offsets),
                self._scale,
                scores=wants_scores,
            )
            hidden = layer.finish(hidden, attended)
            own = [None] * len(caches) if scores is None else np.split(scores.numpy(), offsets[1:-1])
            for cache, weights in zip(caches, own, strict=True):
                cache.settle(index, weights if cache.wants_scores else None)
        return decoder.logits(hidden)

    def _write(self, ids: npt.NDArray[np.int64], keys: Tensor, values: Tensor) -> None:
        self._store.write(torch.from_numpy(ids), keys, values)
