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
from ..model.network.image_features import ImageFeatures
from ..model.vision_language import DeepStack, VisionLanguageModel
from ..request import Prompt
from .base import Layers
from .stored import StoredRows, distances

Attention = tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]
Score = Callable[[Tensor, Tensor, Index], Attention]
"""From query ``[w, H, d]`` of the last w tokens, key ``[n, H_kv, d]`` and the ``[m]`` tokens whose attention is summed
(each from n - w to n - 1): the attention ``[n]`` of the last token, and that sum. On the host, means over heads."""


class Prefill:
    """Runs prompts of ``model`` and writes ``rows``; both lie on one device. ``score`` is asked where a policy is."""

    def __init__(self, model: VisionLanguageModel, rows: StoredRows, score: Score) -> None:
        self._model, self._rows, self._score = model, rows, score
        self._scale = model.spec.text.head_dim**-0.5

    def run(self, prompt: Prompt, features: ImageFeatures | None, cache: SequenceCache) -> Layers[Tensor]:
        """The last token's logits ``[vocabulary]``, on the device, of the tokens from the cache's ``begin`` on: with
        ``features`` of the prompt's pictures, or over the rows that a shared prefix stored of them. Of a shared prefix,
        which asks for no token, its last hidden state."""
        decoder, begin = self._model.decoder, cache.begin
        spans = () if begin else prompt.spans
        hidden = self._model.embed(prompt.token_ids[begin:], spans, features)
        deep = DeepStack(spans, features, hidden.device)
        del features  # they are in the embeddings now: nothing but deep ones is held between two layers
        positions = torch.from_numpy(prompt.coordinates[:, begin:]).to(hidden.device)
        angles = decoder.angles(positions)
        for index in range(len(decoder.layers)):
            if index:
                yield
            hidden, survivors = self._layer(index, hidden, angles, cache)
            if survivors is not None:
                positions = positions[:, survivors]
                angles = decoder.angles(positions)
                deep.keep(survivors)
            deep.add(hidden)
        return hidden[0] if isinstance(cache, SharedPrefixCache) else decoder.logits(hidden)[0]

    def _layer(
        self, index: int, hidden: Tensor, angles: tuple[Tensor, Tensor], cache: SequenceCache
    ) -> tuple[Tensor, Tensor | None]:
        """A layer's output ``[n, hidden]``, of the last one its last token's alone, and which of its tokens go on
        (None: all)."""
        decoder = self._model.decoder
        layer = decoder.layers[index]
        query, key, value = layer.project(hidden, *angles)
        if cache.begin:
            key, value = self._rows.after(cache, index, key, value)
        attended = attend_prompt(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), self._scale)
        scores = (*self._attention(query, key, cache.prompt_queries(index)), distances(value, cache, index))
        self._rows.store_prompt(cache, index, cache.store_prompt(index, *scores), key, value)
        attended = attended.transpose(0, 1)
        if index == len(decoder.layers) - 1:
            return layer.finish(hidden[-1:], attended[-1:]), None
        hidden = layer.finish(hidden, attended)
        survivors = cache.prune_prompt(index, *scores)
        if survivors is None:
            return hidden, None
        chosen = torch.from_numpy(survivors).to(hidden.device)
        return hidden[chosen], chosen

    def _attention(self, query: Tensor, key: Tensor, queries: Index | None) -> Attention:
        if queries is not None:
            return self._score(query, key, queries)
        nothing = np.zeros(len(key), dtype=np.float32)
        return nothing, nothing
