"""Names for settings that were measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf

from ...errors import BadInput
from ..methods import Choice, candidates
from ..methods.notation import parse
from .ranking import INDISTINGUISHABLE, stores_all
from .table import Point, table

_SMALL = 0.13
Serves = Callable[[Choice], bool]
"""Whether a setting is served where it is to run."""


@dataclass(frozen=True)
class Preset:
    """A ``setting`` in the notation of ``avl-edge eval``, held to ``share`` of full attention's bytes (None: as its
    parameters say); ``why`` is what it stands for."""

    name: str
    setting: str
    share: float | None
    why: str

    def choices(self) -> Iterator[Choice]:
        """The setting as its dial goes down; or the one that its parameters say."""
        return _rungs(self.setting, fitted=self.share is not None)


def _rungs(setting: str, *, fitted: bool) -> Iterator[Choice]:
    notation = parse(setting)
    return candidates(notation.name, notation.parameters, fitted, notation.formats)


def _first_served(points: list[Point], serves: Serves) -> Point:
    """The first whose setting is served wherever its dial may stand: A-VL prunes on all rungs but the first. Where none
    is, the first of all, for whose refusal there is a reason."""
    return next((each for each in points if all(map(serves, _rungs(each.setting, fitted=True)))), points[0])


def _measured(point: Point) -> str:
    source = table()
    return (
        f"{100 * point.score:.1f} % right answers (full attention: {100 * source.full.score:.1f} %) from "
        f"{100 * point.stored:.1f} % of the bytes, a step reads {100 * point.read:.1f} %; {source.questions} questions "
        f"of {source.data} to the {source.model} model, {source.date}; other models may rank differently"
    )


def _paper(_: Serves) -> Preset:
    return Preset("paper", "avl", None, "A-VL as published: S 45, C 30, K 3, P 90, T 70, rows in the model's dtype")


def _lossless(serves: Serves) -> Preset:
    # What was left out nobody can read later, and pictures differ from those measured in how much can go: a setting
    # that leaves rows out may have lost nothing there, and is still not called lossless. Nor is a format of which a
    # small model feels nothing, where a real decoder does.
    good = [point for point in table().points if point.score >= table().full.score - INDISTINGUISHABLE]
    whole = [point for point in good if stores_all(point) and _holds_on_text(point)]
    point = _first_served(sorted(whole, key=lambda point: point.stored), serves)
    text = table().text
    why = (
        f"the fewest bytes within {100 * INDISTINGUISHABLE:g} points of full attention with every row stored, in "
        f"formats that raise the perplexity of {text.model} by {100 * INDISTINGUISHABLE:g} % at most ({text.tokens} "
        f"tokens, {text.date}): {_measured(point)}"
    )
    return Preset("lossless", point.setting, 1, why)  # the first rung of its ladder, on any model


def _holds_on_text(point: Point) -> bool:
    rises = {"exact": 0.0, **table().text.rises}
    formats = next(_rungs(point.setting, fitted=True)).formats.by_tier().values()
    return all(rises.get(name, inf) <= INDISTINGUISHABLE for name in formats)


def _small(serves: Serves) -> Preset:
    small = (point for point in table().points if point.stored <= _SMALL)
    point = _first_served(sorted(small, key=lambda point: -point.score), serves)
    return Preset("small", point.setting, point.kv_fraction, f"the best answers from an eighth: {_measured(point)}")


_MAKERS = {"paper": _paper, "lossless": _lossless, "small": _small}
PRESETS = tuple(_MAKERS)


def preset(name: str, serves: Serves = lambda _: True) -> Preset:
    """The preset of that name, of the settings that ``serves`` takes; :class:`BadInput` if there is none."""
    if name not in PRESETS:
        raise BadInput(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return _MAKERS[name](serves)
