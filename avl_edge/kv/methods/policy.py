"""What a policy is: one request's decisions. It sees scores and answers with masks over positions; it never sees a row
id and moves nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .arithmetic import Mask, Scores, groups_of, spread, top, top_of_groups, with_column

Positions = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int32]
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
    of equals the lower positions go on. All text does. ``each``: the place of each picture's first token, and how many
    of that picture go on; without them the pictures' tokens are ranked together."""

    images: int
    by: Literal["last", "total", "distances"]
    each: tuple[tuple[int, int], ...] = ()


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


class RowScores(Protocol):
    """The attention that the rows of a step received: ``image`` ``[L, n]`` and ``text`` ``[L, m]``, zero behind the
    ``image_counts`` and ``text_counts`` int32 ``[L]`` of each layer."""

    image_counts: Counts
    text_counts: Counts

    @property
    def image(self) -> Scores: ...

    @property
    def text(self) -> Scores: ...


class NoScores:
    """Of a step whose scores the policy does not want: no row of any layer."""

    def __init__(self, layers: int) -> None:
        self.image = self.text = np.empty((layers, 0))
        self.image_counts = self.text_counts = np.zeros(layers, dtype=np.int32)


@dataclass(frozen=True)
class Step:
    """A decode step: what :class:`StepLayer` says, of all L layers; ``scores`` of no row unless
    :meth:`Policy.wants_scores`.

    As the step found them: ``positions`` of the text rows int32 ``[L, texts]``, of which those from ``first_image`` on
    are suffix, and which image rows are ``core`` bool ``[L, images]``, both void behind the ``stored_texts`` and
    ``stored_images`` int32 ``[L]`` rows of each layer.
    """

    number: int
    scores: RowScores
    positions: Positions
    first_image: int
    core: Mask
    stored_texts: Counts
    stored_images: Counts

    def layers(self) -> Iterator[StepLayer]:
        """Layer by layer."""
        scores, is_suffix = self.scores, self.positions >= self.first_image
        counts = zip(scores.image_counts.tolist(), scores.text_counts.tolist(), self.stored_texts.tolist(), strict=True)
        for layer, (images, texts, stored) in enumerate(counts):
            found = scores.image[layer, :images], scores.text[layer, :texts]
            yield StepLayer(layer, self.number, *found, is_suffix[layer, :stored])


@dataclass(frozen=True)
class Settlement:
    """What changes from the next step on; None: as is.

    ``core`` is the new core and ``image`` the image rows kept, over the stored image rows as the step found them;
    ``text`` the text rows kept. A core row that is not kept leaves the core too. Masks of one layer ``[n]``, or of all
    ``[L, n]``, where what stands behind a layer's last row is void.
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
        """Whether :meth:`settle_step` looks at this step's scores."""
        ...

    def settle_step(self, step: Step) -> Settlement:
        """What all layers change after a step; asked once per step. :class:`SettlesByLayer` asks
        layer by layer."""
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
    scores = getattr(view, prune.by)[view.is_image]
    if prune.each:
        starts, counts = zip(*prune.each, strict=True)
        found = top_of_groups(scores, groups_of(view.positions[view.is_image], starts), counts)
    else:
        found = top(scores, prune.images)
    return ~view.is_image | spread(found, view.is_image)


class SettlesByLayer:
    """For policies that settle one layer after the other, by :meth:`settle`. Who overrides :meth:`settle_step` is asked
    for all layers at once, and not by that."""

    def settle(self, view: StepLayer) -> Settlement:  # noqa: ARG002
        """What one layer changes after a step, asked in the order of layers: nothing."""
        return Settlement()

    def settle_step(self, step: Step) -> Settlement:
        """:meth:`settle` of all layers."""
        found = [self.settle(view) for view in step.layers()]
        of_core, of_text, of_image = zip(*((each.core, each.text, each.image) for each in found), strict=True)
        texts, images = step.stored_texts, step.stored_images
        return Settlement(_masks(of_core, images, step.core), _masks(of_text, texts), _masks(of_image, images))


def _masks(found: Sequence[Mask | None], counts: Counts, now: Mask | None = None) -> Mask | None:
    """The masks of all layers, as it is ``now`` (None: every row) in a layer that has none; None where none has."""
    if all(each is None for each in found):
        return None
    masks = np.ones((len(found), int(counts.max(initial=0))), dtype=np.bool_)
    if now is not None:
        masks &= now[:, : masks.shape[1]]
    for layer, (mask, count) in enumerate(zip(found, counts.tolist(), strict=True)):
        if mask is not None:
            masks[layer, :count] = mask
    return masks


class Unpruned(SettlesByLayer):
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
    """The rows that a layer holds, image and text together in order of position: equally many in each of L layers.

    For policies that treat all rows alike: they decide over one list, the pool keeps two (image and text).
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._is_image: Mask = np.empty((layers, 0), dtype=np.bool_)

    def store(self, view: PromptLayer, stored: Mask) -> Kept:
        """Begin with the ``stored`` rows of the prompt (a mask ``[m]``), every image row of them core."""
        is_image = view.is_image[stored]
        if view.layer == 0:
            self._is_image = np.empty((self._layers, len(is_image)), dtype=np.bool_)
        self._is_image[view.layer] = is_image
        return Kept(stored, stored & view.is_image)

    def append(self) -> int:
        """The new token's row, of which every step has one, comes last; the number of rows of a layer now."""
        self._is_image = with_column(self._is_image, False)
        return int(self._is_image.shape[1])

    def scores(self, step: Step) -> Scores:
        """The step's scores in one list, ``[L, rows]``."""
        scores = np.empty(self._is_image.shape, dtype=step.scores.text.dtype)
        for mask, of, counts in (
            (self._is_image, step.scores.image, step.scores.image_counts),
            (~self._is_image, step.scores.text, step.scores.text_counts),
        ):
            scores[mask] = of[_first(counts, of.shape[1])]
        return scores

    def keep(self, keep: Mask) -> Settlement:
        """Keep the rows in ``keep`` ``[L, rows]``, a mask over all rows; equally many in each layer."""
        if keep.all():
            return Settlement()
        is_image = self._is_image
        self._is_image = is_image[keep].reshape(self._layers, -1)
        return Settlement(text=_apart(keep, ~is_image), image=_apart(keep, is_image))


def _first(counts: Counts, width: int) -> Mask:
    """The first ``counts`` ``[m]`` of the ``width`` places in each row."""
    mask: Mask = np.arange(width) < counts[:, None]
    return mask


def _apart(keep: Mask, of: Mask) -> Mask:
    """What ``keep`` ``[L, rows]`` says of the rows in ``of``, these side by side."""
    counts = np.count_nonzero(of, axis=1).astype(np.int32)
    found = np.ones((len(of), int(counts.max(initial=0))), dtype=np.bool_)
    found[_first(counts, found.shape[1])] = keep[of]
    return found
