"""Prefill and decode on a backend, without a scheduler: what measures a model, and not its serving, runs this."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from ..kv.budget import KvPlan
from ..kv.cache import SequenceCache
from ..kv.methods import Method
from ..model.network.image_features import ImageFeatures
from ..request import Prompt
from .base import Backend, run_whole
from .step_batch import StepResult


class DecodeLoop:
    """Sequences that are decoded together by ``backend``, which is theirs alone: ``pool`` owns all its rows.

    As a context manager it frees the rows at its end.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.pool = backend.rows.new_pool()
        self.caches: list[SequenceCache] = []

    def encode(self, prompt: Prompt) -> ImageFeatures | None:
        """The features of a prompt's pictures; None without pictures."""
        return (
            None if prompt.pixel_values is None else run_whole(self.backend.begin_encode(prompt.pixel_values.pictures))
        )

    def add(self, prompt: Prompt, plan: KvPlan[Method]) -> SequenceCache:
        """One more sequence, whose prompt is still to be run; :class:`~avl_edge.errors.PoolExhausted` without room."""
        cache = SequenceCache(self.pool, plan, len(prompt), prompt.spans, self.pool.shape.layers, rope=prompt.rope)
        self.caches.append(cache)
        return cache

    def prefill(self, prompt: Prompt, features: ImageFeatures | None, plan: KvPlan[Method]) -> Tensor:
        """:meth:`add` a sequence and run its prompt: the last token's logits ``[vocabulary]``, on the CPU."""
        return self.run(prompt, features, self.add(prompt, plan))

    def run(self, prompt: Prompt, features: ImageFeatures | None, cache: SequenceCache) -> Tensor:
        """Run the prompt of a sequence that was added: the last token's logits ``[vocabulary]``, on the CPU."""
        return run_whole(self.backend.begin_prefill(prompt, features, cache)).cpu()

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """One step for every sequence, in their order: its newest token in, logits ``[sequences, vocabulary]`` out, on
        the CPU."""
        logits = self._step(token_ids, greedy=False).logits
        assert logits is not None, "a step that is not greedy gives logits"
        return logits.cpu()

    def decode_greedy(self, token_ids: Sequence[int]) -> list[int]:
        """As :meth:`decode`, but the likeliest token of each sequence."""
        return list(self._step(token_ids, greedy=True).tokens)

    def _step(self, token_ids: Sequence[int], *, greedy: bool) -> StepResult:
        result = self.backend.decode(token_ids, self.caches, greedy=greedy)
        for error in result.failures.values():
            raise error
        return result

    def __enter__(self) -> DecodeLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for cache in self.caches:
            cache.close()
