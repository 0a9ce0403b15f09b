"""The measured table: answers against bytes, setting by setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Point:
    """One setting at one share of full attention's memory.

    ``setting`` in the notation of ``avl-edge eval``. ``kv_fraction`` is the share that was given, ``stored`` what was
    stored at the end of the answers and ``read`` what a step read, both of full attention's bytes. ``score`` is the
    share of right answers, with its 95 % interval from ``low`` to ``high``.
    """

    setting: str
    kv_fraction: float
    stored: float
    read: float
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class TextQuality:
    """What formats cost on a real decoder: by how much of itself the perplexity of ``model`` rises, by the format of
    all rows, over ``tokens`` of text."""

    model: str
    date: str
    tokens: int
    rises: Mapping[str, float]


@dataclass(frozen=True)
class QualityTable:
    """All points of one evaluation: ``questions`` of ``data``, answered by ``model`` on ``date``; and ``text``."""

    model: str
    data: str
    questions: int
    date: str
    points: tuple[Point, ...]
    text: TextQuality

    @property
    def full(self) -> Point:
        """Full attention's own."""
        return next(point for point in self.points if point.setting == "full")

    def of(self, setting: str) -> list[Point]:
        """A setting's points, the fewest bytes first."""
        return sorted((point for point in self.points if point.setting == setting), key=lambda point: point.stored)

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(point.setting for point in self.points))


@lru_cache(maxsize=1)
def table() -> QualityTable:
    """The table that ships."""
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    points = tuple(Point(**point) for point in content.pop("points"))
    return QualityTable(**content | {"text": TextQuality(**content["text"])}, points=points)
