"""What a policy is: one request's decisions. It sees scores and answers with masks over positions; it never sees a row
id and moves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .arithmetic import Mask, Scores, spread, top

Positions = npt.NDArray[np.int32]
Queries = Literal["none", "last", "suffix", "all"]
"""The prompt's queries whose attention a policy looks at: of none, of the last one, or of the last one and the sums
over the suffix's queries or over all."""


@dataclass(frozen=True)
class PromptLayer:
    """One layer of prefill: the ``m`` tokens that are still in it, in order of position.

    ``positions`` int32 ``[m]``; ``is_image`` and ``is_suffix`` (text after the first image began) bool ``[m]``;
    ``last`` ``[m]`` is the last token's attention; ``total`` ``[m]`` the summed attention of the queries that
    :meth:`Policy.prompt_queries` named for this layer. What it did not ask for is zero. ``distances`` ``[m]``: squared,
    of the tokens' values from the mean value of the images' tokens; empty unless :attr:`Policy.wants_distances`.
    """

    layer: int
    positions: Positions
    is_image: Mask
    is_suffix: Mask
    last: Scores
    total: Scores
    distances: Scores = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Kept:
    """What a layer stores of its prompt, as masks ``[m]``: ``stored`` rows, of whose images ``core`` are core.

    ``earlier``: what layers before it keep from now on of their image rows, as masks over those that they stored.
    """

    stored: Mask
    core: Mask
    earlier: Mapping[int, Mask] = field(default_factory=dict)


class Prune(NamedTuple):
    """How many image tokens go on to the deeper layers, and by which of :class:`PromptLayer`'s fields they are ranked;
    of equals the lower positions go on. All text does."""

    images: int
    by: Literal["last", "total", "distances"]


@dataclass(frozen=True)
class StepLayer:
    """One layer of a decode step: scores of the rows that were attended, in order of position.

    ``image`` covers the core (or all stored image rows when the step read them); ``text`` all text rows,
    the new token's own last; both are empty unless :meth:`Policy.wants_scores`. ``is_suffix`` bool marks the text
    rows that stand after the first image began.
    """

    layer: int
    step: int
    image: Scores
    text: Scores
    is_suffix: Mask


@dataclass(frozen=True)
class Settlement:
    """What changes from the next step on; None: as is.

    ``core`` is the new core and ``image`` the image rows kept, over the stored image rows as the step found them;
    ``text`` the text rows kept. A core row that is not kept leaves the core too.
    """

    core: Mask | None = None
    text: Mask | None = None
    image: Mask | None = None


class Policy(Protocol):
    """One request's decisions."""

    def prompt_queries(self, layer: int) -> Queries:
        """Whose attention in prefill the decisions of ``layer`` depend on."""
        ...

    @property
    def wants_distances(self) -> bool:
        """Whether decisions in prefill depend on the tokens' values."""
        ...

    def keep_prompt(self, view: PromptLayer) -> Kept:
        """Which rows this layer stores, asked once per layer in order."""
        ...

    def prunes(self, layer: int) -> Prune | None:
        """Which image tokens end with ``layer`` of prefill, by its scores; None: none."""
        ...

    def picks_core(self, step: int) -> bool:
        """Whether decode step ``step`` (from 1) picks its core by a scan of all stored keys, before it attends."""
        ...

    def pick_core(self, weights: Scores) -> Mask:
        """The core of this step and layer: a mask over the stored image rows, from their coarse weights."""
        ...

    def nucleus(self) -> tuple[float, int]:
        """What :meth:`pick_core` picks, for whoever picks in its stead: rows in order of their weight until they hold
        this share of the sum, of equal weights the lower positions first, and never more than so many rows. A share of
        1 is never held: it is always as many."""
        ...

    def reads_secondary(self, step: int) -> bool:
        """Whether decode step ``step`` (from 1) attends the secondary rows too."""
        ...

    def wants_scores(self, step: int) -> bool:
        """Whether :meth:`settle` looks at this step's scores."""
        ...

    def settle(self, view: StepLayer) -> Settlement:
        """What one layer changes after a step; asked once per layer and step."""
        ...

    def evictable(self, layer: int, core: Mask) -> int:
        """How many secondary rows ``layer`` could give up between two steps; ``core`` is a mask over its image rows."""
        ...

    def evict(self, layer: int, core: Mask, count: int) -> Mask:
        """Evict ``count`` rows, at most :meth:`evictable`, those with the lowest scores that were last known.

        Returns the rows that stay, a mask over the stored image rows; no later score or mask counts the others.
        """
        ...


def pruned(view: PromptLayer, prune: Prune) -> Mask:
    """The tokens that go on, a mask ``[m]``."""
    return ~view.is_image | spread(top(getattr(view, prune.by)[view.is_image], prune.images), view.is_image)


class Unpruned:
    """For policies under which all tokens of the prompt go through all layers."""

    def prunes(self, layer: int) -> Prune | None:  # noqa: ARG002
        return None


class KeepsRows(Unpruned):
    """For policies that give up no row but when a step settles: they have no secondary rows, or need all of them.
    Their decisions in prefill depend on attention, if on anything."""

    @property
    def wants_distances(self) -> bool:
        return False

    def evictable(self, layer: int, core: Mask) -> int:  # noqa: ARG002
        return 0

    def evict(self, layer: int, core: Mask, count: int) -> Mask:  # noqa: ARG002
        raise AssertionError("this policy has no rows to evict")


class KeepsCore(KeepsRows):
    """For policies whose core changes only when a step settles."""

    def picks_core(self, step: int) -> bool:  # noqa: ARG002
        return False

    def pick_core(self, weights: Scores) -> Mask:  # noqa: ARG002
        raise AssertionError("this policy does not pick its core before a step")

    def nucleus(self) -> tuple[float, int]:
        raise AssertionError("this policy picks no core within a step")


class RowOrder:
    """The rows that each layer holds, image and text together in order of position.

    For policies that treat all rows alike: they decide over one list, the pool keeps two (image and text).
    """

    def __init__(self, layers: int) -> None:
        self._is_image: list[Mask] = [np.empty(0, dtype=np.bool_)] * layers

    def store(self, view: PromptLayer, stored: Mask) -> Kept:
        """Begin with the ``stored`` rows of the prompt (a mask ``[m]``), every image row of them core."""
        self._is_image[view.layer] = view.is_image[stored]
        return Kept(stored, stored & view.is_image)

    def append(self, layer: int) -> int:
        """The new token's row, of which every step has one, comes last; the number of rows now."""
        self._is_image[layer] = np.append(self._is_image[layer], False)
        return len(self._is_image[layer])

    def scores(self, view: StepLayer) -> Scores:
        """The step's scores in one list."""
        is_image = self._is_image[view.layer]
        scores = np.empty(len(is_image), dtype=view.text.dtype)
        scores[is_image], scores[~is_image] = view.image, view.text
        return scores

    def keep(self, layer: int, keep: Mask) -> Settlement:
        """Keep the rows in ``keep``, a mask over all rows of ``layer``."""
        is_image = self._is_image[layer]
        if keep.all():
            return Settlement()
        self._is_image[layer] = is_image[keep]
        return Settlement(text=keep[~is_image], image=keep[is_image])
