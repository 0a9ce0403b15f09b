"""What the runtime asks of a device: pictures to features, a prompt to rows, a step to tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..kv.cache import SequenceCache
from ..model.network.image_features import ImageFeatures
from ..request import PixelValues, Prompt
from .step_batch import StepResult
from .stored import StoredRows

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Layers = Generator[None, None, T]
"""A forward pass as a generator: it stops between two layers, and returns its result."""


class ForwardTask(Protocol[T_co]):
    """A forward pass that is run some layers at a time, so that others get their turn in between."""

    def advance(self, layers: int) -> T_co | None:
        """Run the next ``layers`` (1 or more; a device that cannot stop runs all): its result once the last one is
        done, None before."""
        ...


class Backend(Protocol):
    """What the runtime asks of a device. ``rows`` are those of all sequences, where the device keeps them."""

    name: str
    rows: StoredRows

    def begin_encode(self, pictures: Sequence[PixelValues]) -> ForwardTask[ImageFeatures]:
        """The features of one or more pictures, one after the other."""
        ...

    def begin_prefill(
        self, prompt: Prompt, features: ImageFeatures | None, cache: SequenceCache
    ) -> ForwardTask[Tensor]:
        """Run the prompt, leave in ``cache`` what its policy stores; the last token's logits ``[vocabulary]``,
        where they were computed.

        Of a question over a shared prefix only the tokens from the cache's ``begin`` on are run, without ``features``.
        Of a shared prefix, whose prompt ends with its images, the rows are all that counts.
        """
        ...

    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache], *, greedy: bool = False) -> StepResult:
        """One step for every sequence, its newest token in: logits, or, where all are ``greedy``, tokens that are
        chosen where the logits are. A policy that raises fails its own sequence alone."""
        ...


class LayerTask(Generic[T]):
    """A :class:`ForwardTask` of a generator that stops between two layers."""

    def __init__(self, layers: Layers[T]) -> None:
        self._layers = layers

    @torch.inference_mode()
    def advance(self, layers: int) -> T | None:
        try:
            for _ in range(layers):
                next(self._layers)
        except StopIteration as end:
            result: T = end.value
            return result
        return None


class WholeTask(Generic[T]):
    """A :class:`ForwardTask` that cannot stop on its way."""

    def __init__(self, run: Callable[[], T]) -> None:
        self._run = run

    @torch.inference_mode()
    def advance(self, layers: int) -> T | None:  # noqa: ARG002
        return self._run()


def run_whole(task: ForwardTask[T]) -> T:
    """The result of a task, with nothing in between."""
    while (result := task.advance(sys.maxsize)) is None:
        pass
    return result
