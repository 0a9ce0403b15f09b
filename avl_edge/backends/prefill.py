"""A prompt through the decoder, on any device: each layer stores what its cache chooses before the next one runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..attention.kernels import attend_prompt
from ..kv.cache import SequenceCache
from ..kv.pool.rows import Index
from ..kv.shared_prefix import SharedPrefixCache
from ..model.network import Llava
from ..request import Prompt
from .stored import StoredRows, distances

Attention = tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]
Score = Callable[[Tensor, Tensor, Index], Attention]
"""From query ``[w, H, d]`` of the last w tokens, key ``[n, H_kv, d]`` and the ``[m]`` tokens whose attention is summed
(each from n - w to n - 1): the attention ``[n]`` of the last token, and that sum. On the host, means over heads."""


class Prefill:
    """Runs prompts of ``model`` and writes ``rows``; both lie on one device. ``score`` is asked where a policy is."""

    def __init__(self, model: Llava, rows: StoredRows, score: Score) -> None:
        self._model, self._rows, self._score = model, rows, score
        self._scale = model.spec.text.head_dim**-0.5

    @torch.inference_mode()
    def run(self, prompt: Prompt, features: Tensor | None, cache: SequenceCache) -> Tensor:
        """The last token's logits ``[vocabulary]``, on the device, of the tokens from the cache's ``begin`` on: with
        ``features`` of the prompt's pictures, or over the rows that a shared prefix stored of them."""
        return self._model.decoder.logits(self._last(prompt, features, cache))[0]

    @torch.inference_mode()
    def run_prefix(self, prompt: Prompt, features: Tensor | None, cache: SharedPrefixCache) -> None:
        """The same for a prompt that ends with its pictures, of which only the rows are wanted."""
        self._last(prompt, features, cache)

    def _last(self, prompt: Prompt, features: Tensor | None, cache: SequenceCache) -> Tensor:
        """What the layers make of the last token, ``[1, hidden]``."""
        decoder, begin = self._model.decoder, cache.begin
        hidden = self._model.embed(prompt.token_ids[begin:], () if begin else prompt.spans, features)
        positions = torch.arange(begin, len(prompt), device=hidden.device)
        angles = decoder.angles(positions)
        for index, layer in enumerate(decoder.layers):
            query, key, value = layer.project(hidden, *angles)
            if begin:
                key, value = self._rows.after(cache, index, key, value)
            attended = attend_prompt(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), self._scale)
            scores = (*self._attention(query, key, cache.prompt_queries(index)), distances(value, cache, index))
            self._rows.store_prompt(cache, index, cache.store_prompt(index, *scores), key, value)
            attended = attended.transpose(0, 1)
            if index == len(decoder.layers) - 1:  # of the last layer only the last token is read
                hidden = layer.finish(hidden[-1:], attended[-1:])
                break
            hidden = layer.finish(hidden, attended)
            survivors = cache.prune_prompt(index, *scores)
            if survivors is not None:
                chosen = torch.from_numpy(survivors).to(hidden.device)
                hidden, positions = hidden[chosen], positions[chosen]
                angles = decoder.angles(positions)
        return hidden

    def _attention(self, query: Tensor, key: Tensor, queries: Index | None) -> Attention:
        if queries is not None:
            return self._score(query, key, queries)
        nothing = np.zeros(len(key), dtype=np.float32)
        return nothing, nothing
