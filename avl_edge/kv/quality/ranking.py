"""From the measured table to an order of settings, best answers first."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...config import Formats, KvShape, PromptShape
from ..budget import kv_plan
from ..methods import Choice, Full, Method, candidates
from ..methods.notation import parse
from .table import Point, table

# Scores that lie closer than this to full attention's are not told from it.
INDISTINGUISHABLE = 0.005
# Shares depend a little on a model's heads and a prompt's text.
_MARGIN = 0.9
# Shares are counted on a prompt like those that the table was measured with: one picture, a short question.
_PROMPT = PromptShape(2, 576, 11)
_SHAPE = KvShape(layers=32, kv_heads=8, head_dim=128, itemsize=2)


@dataclass(frozen=True)
class _Rung:
    choice: Choice
    setting: str
    stored: float
    read: float
    score: float


@lru_cache(maxsize=1)
def _rungs() -> tuple[_Rung, ...]:
    """All settings of the table with their dials between and below its points."""
    return tuple(rung for setting in table().settings for rung in _ladder(setting))


@lru_cache(maxsize=512)
def stores_all(point: Point) -> bool:
    """Whether a point of the table left no row out."""
    notation = parse(point.setting)
    budget = round(point.kv_fraction * _PROMPT.length * _SHAPE.layers * _SHAPE.row_bytes)
    settings = candidates(notation.name, notation.parameters, True, notation.formats)
    found = next((each for each in settings if kv_plan(*each, _SHAPE, _PROMPT, 0).peak_bytes <= budget), None)
    return found is not None and _is_whole(found.method)


def _is_whole(method: Method) -> bool:
    return sum(method.peak_tiers(_PROMPT, 0, _SHAPE.layers)) == _PROMPT.length * _SHAPE.layers


def _unbeaten(rungs: Iterable[_Rung]) -> tuple[_Rung, ...]:
    """Those that no other beats: by better answers from no more bytes stored and no more read."""
    kept: list[_Rung] = []
    for rung in sorted(rungs, key=lambda rung: (-rung.score, rung.stored)):
        better = (other for other in kept if other.score > rung.score)
        if not any(other.stored <= rung.stored and other.read <= rung.read for other in better):
            kept.append(rung)
    return tuple(kept)


def _ladder(setting: str) -> list[_Rung]:
    notation, points = parse(setting), table().of(setting)
    full = kv_plan(Full(), Formats(), _SHAPE, _PROMPT, 0).peak_bytes
    shares = [point.stored for point in points]
    scores, reads = rising([point.score for point in points]), [point.read for point in points]
    rungs = []
    for choice in candidates(notation.name, notation.parameters, True, notation.formats):
        stored = kv_plan(*choice, _SHAPE, _PROMPT, 0).peak_bytes / full
        if not _MARGIN * shares[0] <= stored <= shares[-1] / _MARGIN:
            continue  # so little, or so much, was never measured
        # A model whose scales weigh a little less than those measured does not answer worse for it.
        stored_at_least = max(stored, shares[0])
        score = _between(shares, scores, stored_at_least)
        if score >= table().full.score - INDISTINGUISHABLE:
            score = table().full.score
        rungs.append(_Rung(choice, setting, stored, _between(shares, reads, stored_at_least), score))
    return rungs


def rising(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls (pool adjacent violators): more bytes do not make answers worse."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        block = (value, 1)
        while blocks and blocks[-1][0] / blocks[-1][1] > block[0] / block[1]:
            total, count = blocks.pop()
            block = (block[0] + total, block[1] + count)
        blocks.append(block)
    return [total / count for total, count in blocks for _ in range(count)]


def _between(shares: Sequence[float], values: Sequence[float], share: float) -> float:
    """A straight line between the points; below the first one to nothing, beyond the last one as there."""
    xs, ys = [0.0, *shares], [0.0, *values]
    at = bisect_left(xs, share)
    if at >= len(xs):
        return ys[-1]
    low = max(at - 1, 0)
    return ys[low] + (ys[at] - ys[low]) * (share - xs[low]) / (xs[at] - xs[low]) if at else ys[0]


@lru_cache(maxsize=32)
def ranked(formats: Formats | None = None) -> tuple[Choice, ...]:
    """Every setting worth trying, of those in ``formats`` if these are given, best expected answers first; of equals
    those that leave no row out, and then the most bytes.

    Full attention in the model's own dtype comes first: where it fits, nothing is gained by less.
    """
    exact = Choice(Full(), Formats())
    asked = _unbeaten(rung for rung in _rungs() if formats in (None, rung.choice.formats))
    order = sorted(asked, key=lambda rung: (-rung.score, not _is_whole(rung.choice.method), -rung.stored))
    first = [exact] if formats in (None, exact.formats) else []
    return (*first, *(rung.choice for rung in order if rung.choice != exact))


def explain(choice: Choice, *, asked: bool) -> str:
    """Why a setting was picked: because it was ``asked`` for, or for what the table expects of it."""
    rung = next((rung for rung in _rungs() if rung.choice == choice), None)
    source = table()
    if choice == Choice(Full(), Formats()):
        return "everything fits as it is, so nothing is packed and nothing dropped"
    if rung is None:
        return f"{'it was asked for' if asked else 'it keeps the most rows that fit'}; it is not in the measured table"
    why = (
        "it was asked for, and is expected to answer"
        if asked
        else "of all settings that fit it is expected to answer best"
    )
    return (
        f"{why}: {100 * rung.score:.1f} % right where full attention "
        f"has {100 * source.full.score:.1f} %, by {source.questions} questions of {source.data} to the {source.model} "
        f"model ({source.date}); other models may rank differently"
    )
