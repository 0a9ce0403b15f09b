"""Looking facts up: the first source that can be read and understood, and why the others could not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .live import ask
from .tree import Reading, Tree

T = TypeVar("T")


class Finder:
    """Reads from a tree and collects the reasons for what it does not find.

    A source is the path of a file ("/proc/meminfo") or the name of a program ("tegrastats").
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.unknown: dict[str, str] = {}
        self.derived: dict[str, str] = {}
        self.warnings: list[str] = []
        self._asked: dict[str, Reading] = {}

    def first(self, field: str, *sources: tuple[str, Callable[[str], T | None]]) -> T | None:
        """What the first (source, parser) gives; if none does, ``unknown[field]`` says why."""
        reasons = []
        for source, parse in sources:
            reading = self._read(source)
            value = None if reading.text is None else parse(reading.text)
            if value is not None:
                return value
            reasons.append(f"{source}: {reading.reason or 'not understood'}")
        self.unknown[field] = "; ".join(reasons) or "nothing on this machine tells it"
        return None

    def quietly(self, source: str, parse: Callable[[str], T | None]) -> T | None:
        """Like :meth:`first`, for a fact whose absence means nothing."""
        text = self._read(source).text
        return None if text is None else parse(text)

    def _read(self, source: str) -> Reading:
        if source.startswith("/"):
            return self.tree.read(source)
        if source not in self._asked:  # a program is asked once
            self._asked[source] = ask(self.tree, source)
        return self._asked[source]
