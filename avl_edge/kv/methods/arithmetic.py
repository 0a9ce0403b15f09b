"""What methods count and rank with: exact percents, and masks of the highest scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..books import books

Scores = npt.NDArray[Any]
"""float32 or float64 attention weights: post-softmax, averaged over the query heads."""
Mask = npt.NDArray[np.bool_]


def whole(value: float) -> bool:
    """Whether a parameter is a whole number."""
    return math.isfinite(value) and value == int(value)


@lru_cache(maxsize=256)
def exact(percent: float) -> Fraction:
    """The decimal number that was written, not the binary one nearest to it: 32.3 % of 1000 are 323."""
    return Fraction(str(percent))


@lru_cache(maxsize=4096)
def share(count: int, percent: float) -> int:
    """``percent`` of ``count``, rounded down: the paper's int(S*N)."""
    return int(count * exact(percent) // 100)


@lru_cache(maxsize=4096)
def rounded_share(count: int, percent: float) -> int:
    """``percent`` of ``count``, halves to even."""
    return round(count * exact(percent) / 100)


def top(scores: Scores, count: int) -> Mask:
    """The ``count`` highest scores of each row of ``scores``, ``[n]`` or ``[m, n]``, as a mask; ties go to the lower
    position, NaN comes last."""
    length = scores.shape[-1]
    if not 0 < count < length:
        return np.full(scores.shape, count > 0)
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)
    rows = np.ascontiguousarray(scores).reshape(-1, length)
    return books().top(rows, count).reshape(scores.shape)


def top_of_each(scores: Scores, counts: npt.NDArray[np.int32], count: int) -> Mask:
    """:func:`top` of the first ``counts`` ``[m]`` scores in each row of ``scores`` ``[m, n]``."""
    if np.all(counts == scores.shape[1]):
        return top(scores, count)
    mask = np.zeros(scores.shape, dtype=np.bool_)
    for row, length in enumerate(counts.tolist()):
        mask[row, :length] = top(scores[row, :length], count)
    return mask


def groups_of(positions: npt.NDArray[np.int32], starts: Sequence[int]) -> npt.NDArray[np.int64]:
    """The number of the picture that each of ``positions`` is in, by the pictures' first ones."""
    return np.searchsorted(np.asarray(starts), positions, side="right") - 1


def top_of_groups(scores: Scores, groups: npt.NDArray[np.int64], counts: Sequence[int]) -> Mask:
    """:func:`top` of the ``scores`` ``[n]`` of each group, of which there are so many to take; ``groups`` int64
    ``[n]``: the number of that which each belongs to."""
    mask = np.zeros(len(scores), dtype=np.bool_)
    for group, count in enumerate(counts):
        members = np.flatnonzero(groups == group)
        mask[members] = top(scores[members], count)
    return mask


def without_lowest(scores: Scores, core: Mask, count: int) -> Mask:
    """All rows but the ``count`` lowest-scored ones that are not core; of equals the higher positions go."""
    return core | spread(top(scores[~core], int((~core).sum()) - count), ~core)


def heavy_and_recent(sums: Scores, budget: int, heavy: float) -> Mask:
    """The ``budget`` rows that stay of those of each layer, by their ``sums`` ``[L, n]``: ``heavy`` percent of them
    those with the highest sums, the others the most recent; all where there are no more."""
    count = sums.shape[1]
    keep = np.ones(sums.shape, dtype=np.bool_)
    if count > budget:
        hitters = share(budget, heavy)
        older = count - (budget - hitters)
        keep[:, :older] = top(sums[:, :older], hitters)
    return keep


def spread(selected: Mask, within: Mask) -> Mask:
    """A mask over the true entries of ``within`` as a mask over all its entries."""
    mask = np.zeros(len(within), dtype=np.bool_)
    mask[np.flatnonzero(within)[selected]] = True
    return mask


def recent(count: int, budget: int) -> Mask:
    """The last ``budget`` of ``count`` rows as a mask; all of them when there are no more."""
    return np.arange(count) >= count - budget


def with_column(rows: npt.NDArray[Any], value: float) -> npt.NDArray[Any]:
    """``rows`` ``[m, n]`` with one more column."""
    wider = np.empty((len(rows), rows.shape[1] + 1), dtype=rows.dtype)
    wider[:, :-1], wider[:, -1] = rows, value
    return wider
