"""What is computed for requests: a prompt layer by layer, then the next token of everybody who runs."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TypeVar

from torch import Tensor

from ..backends.base import Backend, ForwardTask
from ..backends.step_batch import StepResult
from ..model.features import FeatureCache
from ..model.network.image_features import ImageFeatures
from ..request import Prompt
from .requests import Running, SharedPrefix
from .scheduler import Scheduler

T = TypeVar("T")
Layers = Generator[None, None, T]
"""Work that stops after each layer of the model; what it returns is its result."""


class ModelRunner:
    """Runs the model on ``backend`` for what ``scheduler`` says is next; ``features`` are those of its pictures."""

    def __init__(self, backend: Backend, features: FeatureCache, scheduler: Scheduler) -> None:
        self._backend, self._features, self._scheduler = backend, features, scheduler

    def prompt(self, sequence: Running) -> Layers[Tensor | None]:
        """Admit a request and run its pictures and its prompt, before it the prefix of its image session where nobody
        has yet: the last token's logits ``[vocabulary]``, None where it asks for no token."""
        request = sequence.request
        self._scheduler.begin(sequence)
        if request.prefix and not request.prefix.is_ready:
            yield from self._prefix(sequence, request.prefix)
        if request.max_new_tokens == 0:
            return None
        cache, features = self._scheduler.admit(sequence), None
        if request.prefix is None:
            features = yield from self._encode(sequence, request.prompt, sequence)
        task = self._backend.begin_prefill(request.prompt, features, cache)
        del features  # the task lets go of them after its first layer
        return (yield from _run(task, sequence, "prefill_seconds"))

    def _prefix(self, sequence: Running, prefix: SharedPrefix) -> Layers[None]:
        """Admit the pictures of an image session and run them."""
        cache = self._scheduler.admit_prefix(prefix, sequence)
        prefix.encode_seconds = prefix.prefill_seconds = 0.0
        features = yield from self._encode(sequence, prefix.prompt, prefix)
        task = self._backend.begin_prefill(prefix.prompt, features, cache)
        del features
        yield from _run(task, prefix, "prefill_seconds")
        self._scheduler.finish_prefix(prefix)
        yield

    def _encode(self, sequence: Running, prompt: Prompt, of: Running | SharedPrefix) -> Layers[ImageFeatures | None]:
        """The features of the pixels of ``sequence``, which are let go; None for a prompt
        without pictures. ``of``: whose time it takes."""
        if not prompt.spans:
            return None
        features = known = self._features.find(prompt)
        if features is None:
            assert sequence.pixels is not None, "pixels are let go once they are encoded, and by who has ended"
            features = yield from _run(self._backend.begin_encode(sequence.pixels.pictures), of, "encode_seconds")
        sequence.pixels = None
        if known is None:
            yield
        self._features.keep(prompt, features)
        return features

    def decode(self, sequences: Sequence[Running]) -> StepResult:
        """One step for all of them; where all are greedy, the backend chooses the tokens."""
        tokens = [sequence.token_ids[-1] for sequence in sequences]
        caches = [sequence.admitted_cache for sequence in sequences]
        return self._backend.decode(tokens, caches, greedy=all(sequence.sampler.greedy for sequence in sequences))


def _run(task: ForwardTask[T], of: Running | SharedPrefix, spent: str) -> Layers[T]:
    """A task's result; the seconds that its layers take are added to that attribute."""
    while True:
        start = time.perf_counter()
        result = task.advance(1)
        setattr(of, spent, getattr(of, spent) + time.perf_counter() - start)
        if result is not None:
            return result
        yield
