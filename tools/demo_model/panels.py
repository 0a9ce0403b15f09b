"""Items that are mostly text: the screen, the direction sign, the number plate, the thermometer."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Protocol

from tools.demo_model.canvas import Canvas, Type
from tools.demo_model.facts import Facts
from tools.demo_model.vocabulary import (
    CITIES,
    MAX_SCREEN_LINES,
    MAX_SIGN_LINES,
    SCREEN_WORDS,
    Colour,
    word_from,
)

MAX_TEXT_WIDTH = 190.0


class Item(Protocol):
    """Something that can be placed in a scene: a size in pixels, a way to draw it, and what it says."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def facts(self) -> Facts: ...

    def draw(self, canvas: Canvas, x: int, y: int) -> None: ...


def random_type(rng: random.Random, low: int, high: int) -> Type:
    """A random bold-enough typeface between ``low`` and ``high`` pixels."""
    return Type(face=rng.randrange(8), size=rng.randint(low, high), spacing=rng.uniform(0.2, 1.0))


@dataclass(frozen=True)
class Screen:
    """An infotainment screen with a few lines of text."""

    lines: tuple[str, ...]
    kind: Type
    pitch: int
    ink: Colour
    paper: Colour

    @property
    def width(self) -> int:
        return int(max(self.kind.width(line) for line in self.lines)) + 16

    @property
    def height(self) -> int:
        return self.pitch * len(self.lines) + 12

    @property
    def facts(self) -> Facts:
        return Facts(screen=self.lines)

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        box = (x, y, x + self.width - 1, y + self.height - 1)
        canvas.pen.rounded_rectangle(box, 4, fill=self.paper, outline=(90, 90, 100), width=2)
        for i, line in enumerate(self.lines):
            canvas.write(x + 8, y + 6 + i * self.pitch, line, self.kind, self.ink, f"screen{i}")


def _screen_line(rng: random.Random) -> str:
    choice = rng.random()
    word = word_from(rng, SCREEN_WORDS)
    if choice < 0.25:
        return word
    if choice < 0.55:
        return f"{word} {word_from(rng, SCREEN_WORDS)}"
    if choice < 0.75:
        return f"{word} {rng.randint(1, 999)}"
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d} {word}"


def sample_screen(rng: random.Random) -> Screen:
    """A screen of 2 to 5 different lines, light on dark or dark on light."""
    kind = random_type(rng, 14, 18)
    lines: list[str] = []
    count = rng.choice((2, 2, 3, 3, 3, 4, 4, MAX_SCREEN_LINES))
    while len(lines) < count:
        line = _screen_line(rng)
        if line not in lines and kind.width(line) <= MAX_TEXT_WIDTH:
            lines.append(line)
    dark = rng.random() < 0.6
    ink = rng.choice(((240, 240, 240), (120, 230, 255), (255, 210, 90)) if dark else ((10, 10, 10), (20, 40, 120)))
    paper = (15, 20, 35) if dark else (225, 228, 235)
    return Screen(tuple(lines), kind, kind.height + rng.randint(1, 6), ink, paper)


@dataclass(frozen=True)
class Sign:
    """A direction sign: places on the left, distances in kilometres on the right."""

    lines: tuple[tuple[str, int], ...]
    kind: Type
    pitch: int
    ink: Colour
    paper: Colour

    @property
    def width(self) -> int:
        return int(max(self.kind.width(f"{place}  {km}") for place, km in self.lines)) + 20

    @property
    def height(self) -> int:
        return self.pitch * len(self.lines) + 12

    @property
    def facts(self) -> Facts:
        return Facts(sign=self.lines)

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        right = x + self.width - 1
        box = (x, y, right, y + self.height - 1)
        canvas.pen.rounded_rectangle(box, 5, fill=self.paper, outline=self.ink, width=2)
        for i, (place, km) in enumerate(self.lines):
            top = y + 6 + i * self.pitch
            canvas.write(x + 8, top, place, self.kind, self.ink, f"place{i}")
            left = right - 8 - self.kind.width(str(km))
            canvas.write(left, top, str(km), self.kind, self.ink, f"distance{i}")


def sample_sign(rng: random.Random) -> Sign:
    """A sign of 1 to 4 different places in the colours of European signs."""
    kind = random_type(rng, 14, 19)
    places: list[str] = []
    count = rng.choice((1, 2, 2, 3, 3, MAX_SIGN_LINES))
    while len(places) < count:
        place = word_from(rng, CITIES)
        if place not in places and kind.width(place) <= MAX_TEXT_WIDTH - 50:
            places.append(place)
    paper = rng.choice(((0, 90, 50), (10, 60, 150), (240, 240, 235), (250, 205, 40)))
    ink = (250, 250, 250) if paper[0] < 100 else (10, 10, 10)
    lines = tuple((place, rng.randint(2, 420)) for place in places)
    return Sign(lines, kind, kind.height + rng.randint(1, 6), ink, paper)


@dataclass(frozen=True)
class Plate:
    """A number plate."""

    text: str
    kind: Type
    paper: Colour

    @property
    def width(self) -> int:
        return int(self.kind.width(self.text)) + 18

    @property
    def height(self) -> int:
        return self.kind.height + 8

    @property
    def facts(self) -> Facts:
        return Facts(plate=self.text)

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        box = (x, y, x + self.width - 1, y + self.height - 1)
        canvas.pen.rounded_rectangle(box, 3, fill=self.paper, outline=(10, 10, 10), width=2)
        canvas.write(x + 9, y + 3, self.text, self.kind, (10, 10, 10), "plate")


def sample_plate(rng: random.Random) -> Plate:
    """Two letters, three digits and up to two letters more, on white or yellow."""
    letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(2))
    tail = "".join(rng.choice(string.ascii_uppercase) for _ in range(rng.randint(0, 2)))
    text = f"{letters}{rng.randint(0, 999):03d}{tail}"
    return Plate(text, random_type(rng, 16, 20), rng.choice(((245, 245, 245), (250, 220, 60))))


@dataclass(frozen=True)
class Thermometer:
    """The outside temperature in degrees Celsius, as digits."""

    degrees: int
    kind: Type
    paper: Colour

    @property
    def width(self) -> int:
        return int(self.kind.width(self._text)) + 16

    @property
    def height(self) -> int:
        return self.kind.height + 8

    @property
    def facts(self) -> Facts:
        return Facts(temperature=self.degrees)

    @property
    def _text(self) -> str:
        return f"{self.degrees}C"

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        canvas.pen.rounded_rectangle((x, y, x + self.width - 1, y + self.height - 1), 6, fill=self.paper)
        canvas.write(x + 8, y + 3, self._text, self.kind, (180, 220, 255), "temperature")


def sample_thermometer(rng: random.Random) -> Thermometer:
    """Between -15 and 40 degrees."""
    paper = rng.choice(((20, 20, 26), (40, 24, 24), (16, 40, 60)))
    return Thermometer(rng.randint(-15, 40), random_type(rng, 16, 20), paper)
