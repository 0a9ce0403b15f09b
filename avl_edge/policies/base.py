"""What a method is: settings that are checked and counted, and a policy that says which row is in which tier.

A method is one file with one frozen dataclass (its settings, named by the paper's symbols in the docstring)
and the policy that the dataclass makes, one per request. A policy sees scores and answers with masks over
positions; it never sees a row id and moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ..config import PromptShape

Scores = npt.NDArray[Any]
"""float32 or float64 attention weights: post-softmax, averaged over the query heads."""
Mask = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PromptLayer:
    """One layer of prefill: the ``m`` tokens that are still in it, in order of position.

    ``positions`` int32 ``[m]``; ``is_image`` and ``is_suffix`` (text after the first image began) bool ``[m]``;
    ``last`` ``[m]`` is the last token's attention; ``total`` ``[m]`` the summed attention of the suffix's queries.
    """

    layer: int
    positions: Positions
    is_image: Mask
    is_suffix: Mask
    last: Scores
    total: Scores


@dataclass(frozen=True)
class Kept:
    """What a layer stores of its prompt, as masks ``[m]``: ``stored`` rows, of whose images ``core`` are core."""

    stored: Mask
    core: Mask


@dataclass(frozen=True)
class StepLayer:
    """One layer of a decode step: scores of the rows that were attended, in order of position.

    ``image`` covers the core (or all stored image rows when the step read them); ``text`` all text rows,
    the new token's own last; ``is_suffix`` bool marks the text rows that may be evicted.
    """

    layer: int
    step: int
    image: Scores
    text: Scores
    is_suffix: Mask


@dataclass(frozen=True)
class Settlement:
    """What changes from the next step on: the new core (over stored image rows), the text rows kept. None: as is."""

    core: Mask | None = None
    text: Mask | None = None


class Policy(Protocol):
    """One request's decisions."""

    prompt_scores: bool
    """Whether prefill has to score the prompt."""

    def keep_prompt(self, view: PromptLayer) -> Kept:
        """Which rows this layer stores, asked once per layer in order."""
        ...

    def prune_prompt(self, view: PromptLayer) -> Mask | None:
        """Which tokens go on to the deeper layers, as a mask ``[m]``; None: all."""
        ...

    def reads_secondary(self, step: int) -> bool:
        """Whether decode step ``step`` (from 1) attends the secondary rows too."""
        ...

    def wants_scores(self, step: int) -> bool:
        """Whether :meth:`settle` needs this step's scores; when False it is not called."""
        ...

    def settle(self, view: StepLayer) -> Settlement:
        """What one layer changes after a step."""
        ...


class Method(Protocol):
    """The settings of a method: a frozen dataclass whose fields are its parameters."""

    name: ClassVar[str]

    def peak_rows(self, prompt: PromptShape, steps: int, layers: int) -> int:
        """The most rows, over all layers, that a request holds at any time within ``steps`` decode steps."""
        ...

    def policy(self, prompt: PromptShape, layers: int) -> Policy:
        """The policy of one request."""
        ...

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[Method]:
        """Settings to try for a budget, best answers first; ``fixed`` parameters stay as given."""
        ...


def share(count: int, percent: float) -> int:
    """``percent`` of ``count``, rounded down: the paper's int(S*N)."""
    return int(count * percent // 100)


def top(scores: Scores, count: int) -> Mask:
    """The ``count`` highest scores as a mask; ties go to the lower position."""
    mask = np.zeros(len(scores), dtype=np.bool_)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask


def spread(selected: Mask, within: Mask) -> Mask:
    """A mask over the true entries of ``within`` as a mask over all its entries."""
    mask = np.zeros(len(within), dtype=np.bool_)
    mask[np.flatnonzero(within)[selected]] = True
    return mask
