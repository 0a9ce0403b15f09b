"""Items of the street: the speed-limit sign, the traffic light, the car park."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.demo_model.canvas import Canvas, Type
from tools.demo_model.facts import Facts
from tools.demo_model.panels import random_type
from tools.demo_model.vocabulary import LIGHTS, LIMITS, PAINT, Colour

LOT_ROWS = 2
LOT_COLUMNS = 4
DARK: Colour = (52, 52, 52)


@dataclass(frozen=True)
class LimitSign:
    """A white disc with a red rim and the limit in the middle."""

    limit: int
    radius: int
    kind: Type

    @property
    def width(self) -> int:
        return 2 * self.radius + 1

    @property
    def height(self) -> int:
        return 2 * self.radius + 1

    @property
    def facts(self) -> Facts:
        return Facts(limit=self.limit)

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        r = self.radius
        canvas.pen.ellipse((x, y, x + 2 * r, y + 2 * r), fill=(250, 250, 250), outline=(210, 20, 20), width=6)
        canvas.write_centred(x + r, y + r - self.kind.size * 0.62, str(self.limit), self.kind, (0, 0, 0), "limit")


def sample_limit(rng: random.Random) -> LimitSign:
    """One of the common limits."""
    return LimitSign(rng.choice(LIMITS), rng.randint(30, 36), random_type(rng, 18, 22))


@dataclass(frozen=True)
class TrafficLight:
    """Three lamps above each other, one of them lit."""

    lit: str
    radius: int

    @property
    def width(self) -> int:
        return 2 * self.radius + 9

    @property
    def height(self) -> int:
        return 6 * self.radius + 17

    @property
    def facts(self) -> Facts:
        return Facts(light=self.lit)

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        box = (x, y, x + self.width - 1, y + self.height - 1)
        canvas.pen.rounded_rectangle(box, 5, fill=(15, 15, 15), outline=(80, 80, 80))
        for i, name in enumerate(LIGHTS):
            top = y + 4 + i * (2 * self.radius + 4)
            colour = PAINT[name] if name == self.lit else DARK
            canvas.pen.ellipse((x + 4, top, x + 4 + 2 * self.radius, top + 2 * self.radius), fill=colour)
        canvas.mark(box, f"light_{self.lit}")


def sample_light(rng: random.Random) -> TrafficLight:
    """Red, yellow or green."""
    return TrafficLight(rng.choice(LIGHTS), rng.randint(8, 11))


@dataclass(frozen=True)
class CarPark:
    """Two rows of four places, some of them taken by cars seen from above; ``places`` is row by row."""

    places: tuple[str | None, ...]
    car_width: int
    car_length: int

    @property
    def width(self) -> int:
        return LOT_COLUMNS * (self.car_width + 14) + 4

    @property
    def height(self) -> int:
        return LOT_ROWS * (self.car_length + 8) + 4

    @property
    def facts(self) -> Facts:
        return Facts(cars=tuple(colour for colour in self.places if colour))

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        pitch, row = self.car_width + 14, self.car_length + 8
        bottom, right = y + self.height - 1, x + self.width - 1
        canvas.pen.rectangle((x, y, right, bottom), fill=(75, 75, 78))
        for i in range(LOT_COLUMNS + 1):
            canvas.pen.line((x + 2 + i * pitch, y + 2, x + 2 + i * pitch, bottom - 2), fill=(200, 200, 200))
        canvas.pen.line((x + 2, y + 2 + row, right - 2, y + 2 + row), fill=(200, 200, 200))
        for i, colour in enumerate(self.places):
            if colour:
                self._car(canvas, x + 9 + i % LOT_COLUMNS * pitch, y + 6 + i // LOT_COLUMNS * row, colour)

    def _car(self, canvas: Canvas, x: int, y: int, colour: str) -> None:
        right, bottom = x + self.car_width, y + self.car_length
        canvas.pen.rounded_rectangle((x, y, right, bottom), 6, fill=PAINT[colour], outline=(20, 20, 20))
        for top in (y + self.car_length // 4, y + self.car_length * 7 // 10):
            canvas.pen.rectangle((x + 4, top, right - 4, top + 5), fill=(40, 50, 60))
        canvas.mark((x, y, right, bottom), f"car_{colour}")


def sample_cars(rng: random.Random) -> CarPark:
    """1 to 6 cars in 2 to 4 colours."""
    palette = rng.sample(list(PAINT), rng.randint(2, 4))
    places: list[str | None] = [None] * (LOT_ROWS * LOT_COLUMNS)
    for i in rng.sample(range(len(places)), rng.randint(1, 6)):
        places[i] = rng.choice(palette)
    return CarPark(tuple(places), rng.randint(22, 27), rng.randint(36, 42))
