"""Prefill and decode on a backend, without a scheduler: what measures a model, and not its serving, runs this."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from ..kv.budget import KvPlan
from ..kv.cache import SequenceCache
from ..kv.methods import Method
from ..request import Prompt
from .base import Backend


class DecodeLoop:
    """Sequences that are decoded together by ``backend``, which is theirs alone: ``pool`` owns all its rows.

    As a context manager it frees the rows at its end.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.pool = backend.rows.new_pool()
        self.caches: list[SequenceCache] = []

    def encode(self, prompt: Prompt) -> Tensor | None:
        """Features ``[images, tokens, hidden]``; None for a prompt without pictures."""
        return None if prompt.pixel_values is None else self.backend.encode_images(prompt.pixel_values)

    def add(self, prompt: Prompt, plan: KvPlan[Method]) -> SequenceCache:
        """One more sequence, whose prompt is still to be run; :class:`~avl_edge.errors.PoolExhausted` without room."""
        cache = SequenceCache(self.pool, plan, len(prompt), prompt.spans, self.pool.shape.layers)
        self.caches.append(cache)
        return cache

    def prefill(self, prompt: Prompt, features: Tensor | None, plan: KvPlan[Method]) -> Tensor:
        """:meth:`add` a sequence and run its prompt: the last token's logits ``[vocabulary]``."""
        return self.backend.prefill(prompt, features, self.add(prompt, plan))

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """One step for every sequence, in their order: its newest token in, logits ``[sequences, vocabulary]`` out."""
        return self.backend.decode(token_ids, self.caches)

    def decode_greedy(self, token_ids: Sequence[int]) -> list[int]:
        """As :meth:`decode`, but the likeliest token of each sequence."""
        return self.backend.decode_greedy(token_ids, self.caches)

    def __enter__(self) -> DecodeLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for cache in self.caches:
            cache.close()
