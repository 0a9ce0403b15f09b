"""What is true about a scene: the only source of answers."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Facts:
    """The contents of a scene; None is an item that is not in the picture.

    An empty ``lamps`` is a lamp panel with every lamp off. ``cars`` is in reading order: row by row, left to right.
    """

    screen: tuple[str, ...] | None = None
    sign: tuple[tuple[str, int], ...] | None = None
    speed: int | None = None
    unit: str | None = None
    gear: str | None = None
    fuel: int | None = None
    temperature: int | None = None
    limit: int | None = None
    light: str | None = None
    lamps: tuple[str, ...] | None = None
    plate: str | None = None
    cars: tuple[str, ...] | None = None

    def merged(self, other: Facts) -> Facts:
        """The facts of both; ``other`` wins where both say something."""
        values = {f.name: getattr(other, f.name) for f in fields(other)}
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return Facts(**{name: own[name] if value is None else value for name, value in values.items()})
