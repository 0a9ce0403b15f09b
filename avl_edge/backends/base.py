"""What the runtime asks of a device: pictures to features, a prompt to rows, a step to tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kv.cache import SequenceCache
from ..request import Prompt
from .step_batch import StepResult
from .stored import StoredRows

Layers = Generator[None, None, Tensor]
"""A forward pass as a generator: it stops between two layers, and returns its result."""


class ForwardTask(Protocol):
    """A forward pass that is run some layers at a time, so that others get their turn in between."""

    def advance(self, layers: int) -> Tensor | None:
        """Run the next ``layers`` (1 or more; a device that cannot stop runs all): its result once the last one is
        done, None before."""
        ...


class Backend(Protocol):
    """What the runtime asks of a device. ``rows`` are those of all sequences, where the device keeps them."""

    name: str
    rows: StoredRows

    def begin_encode(self, pixels: npt.NDArray[np.float32]) -> ForwardTask:
        """float32 ``[images, 3, H, W]`` to features ``[images, tokens, hidden]``, one picture after the other."""
        ...

    def begin_prefill(self, prompt: Prompt, features: Tensor | None, cache: SequenceCache) -> ForwardTask:
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


class LayerTask:
    """A :class:`ForwardTask` of a generator that stops between two layers."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers

    @torch.inference_mode()
    def advance(self, layers: int) -> Tensor | None:
        try:
            for _ in range(layers):
                next(self._layers)
        except StopIteration as end:
            result: Tensor = end.value
            return result
        return None


class WholeTask:
    """A :class:`ForwardTask` that cannot stop on its way."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run

    @torch.inference_mode()
    def advance(self, layers: int) -> Tensor | None:  # noqa: ARG002
        return self._run()


def run_whole(task: ForwardTask) -> Tensor:
    """The result of a task, with nothing in between."""
    while (result := task.advance(sys.maxsize)) is None:
        pass
    return result
