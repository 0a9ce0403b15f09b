"""What a step computes: a picture's features, a prompt's rows, the next token of each sequence."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from ..backends.base import Backend
from ..model.features import FeatureCache
from .scheduler import Running, Scheduler, SharedPrefix, Work


class ModelRunner:
    """Runs the model on ``backend`` for what ``scheduler`` says is next; ``features`` are those of its pictures."""

    def __init__(self, backend: Backend, features: FeatureCache, scheduler: Scheduler) -> None:
        self._backend, self._features, self._scheduler = backend, features, scheduler

    def next_tokens(self, work: Work) -> Iterator[int]:
        """The next token of each sequence: sampled one by one as they are asked for, or chosen by the backend where
        all are greedy."""
        if work.prefill:
            (sequence,) = work.sequences
            return iter([sequence.sampler(self._prefill(sequence))])
        tokens = [sequence.token_ids[-1] for sequence in work.sequences]
        caches = [sequence.admitted_cache for sequence in work.sequences]
        if all(sequence.sampler.greedy for sequence in work.sequences):
            return iter(self._backend.decode_greedy(tokens, caches))
        logits = self._backend.decode(tokens, caches)
        return (sequence.sampler(own) for sequence, own in zip(work.sequences, logits, strict=True))

    def _prefill(self, sequence: Running) -> Tensor:
        """Admit a request and run its prompt: the last token's logits ``[vocabulary]``."""
        prompt, cache = sequence.request.prompt, self._scheduler.admit(sequence)
        start = time.perf_counter()
        features = None if sequence.request.prefix else self._features(prompt)
        encoded = time.perf_counter()
        logits = self._backend.prefill(prompt, features, cache)
        sequence.encode_seconds = encoded - start
        sequence.prefill_seconds = time.perf_counter() - encoded
        return logits

    def prefill_prefix(self, prefix: SharedPrefix | None) -> None:
        """Admit the pictures of an image session and run them, with the first question about it."""
        if prefix is None or prefix.is_ready:
            return
        cache = self._scheduler.admit_prefix(prefix)
        start = time.perf_counter()
        features = self._features(prefix.prompt)
        prefix.encode_seconds = time.perf_counter() - start
        self._backend.prefill_prefix(prefix.prompt, features, cache)
        prefix.prefill_seconds = time.perf_counter() - start - prefix.encode_seconds
        prefix.is_ready = True
