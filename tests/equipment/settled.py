"""A step's end without a device: scores layer by layer, in the order in which rows are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from avl_edge.kv.cache import SequenceCache
from avl_edge.kv.methods import Policy, Settlement, Step
from avl_edge.kv.pool import Moved
from avl_edge.kv.selection import ListedRows, StepScores

Scores = npt.NDArray[Any]


def settle(cache: SequenceCache, scores: Sequence[Scores] | None) -> list[Moved]:
    """End a step with the ``scores`` of each layer's rows; None where the policy does not want them."""
    if scores is None:
        return cache.settle(None)
    read = cache.rows_read_now
    made = StepScores(read, scores[0].dtype)
    for layer, each in enumerate(scores):
        order = [rows.order for rows in cache.rows_to_read(layer)]
        if order:
            ListedRows([read], layer).give(made, 0, each[np.concatenate(order)])
    return cache.settle(made)


def settle_at_random(cache: SequenceCache, random: np.random.Generator) -> list[Moved]:
    """Pick the step's core, where the policy does, and end it, both by random scores."""
    for layer in range(len(cache.rows.layers)) if cache.picks_core else ():
        cache.pick_core(layer, random.random(len(cache.rows_scanned_now.of(layer))))
    counts = [sum(map(len, cache.rows_to_read(layer))) for layer in range(len(cache.rows.layers))]
    return settle(cache, [random.random(count) for count in counts] if cache.wants_scores else None)


def by_layer(moved: Sequence[Moved], layers: int) -> Iterator[tuple[int, list[Moved]]]:
    """The rows that moved, those of one layer after the other."""
    for layer in range(layers):
        own = (each.of(layer, layer + 1) for each in moved)
        yield layer, [each for each in own if len(each.before)]


def settle_policy(policy: Policy, number: int, image: Scores, text: Scores) -> Settlement:
    """What a policy changes after a step in which all layers read equally many rows and no others are stored:
    ``image`` ``[L, n]``, ``text`` ``[L, m]``, whose first row stands at position 0."""
    scores = GivenScores(image, text)
    positions = np.tile(np.arange(text.shape[1], dtype=np.int32), (len(text), 1))
    core = np.ones(image.shape, dtype=np.bool_)
    return policy.settle_step(Step(number, scores, positions, 0, core, scores.text_counts, scores.image_counts))


class GivenScores:
    """Of equally many rows in all layers."""

    def __init__(self, image: Scores, text: Scores) -> None:
        self.image, self.text = image, text
        self.image_counts, self.text_counts = (np.full(len(x), x.shape[1], dtype=np.int32) for x in (image, text))
