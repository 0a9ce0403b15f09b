"""Items of the cockpit: the speedometer, the gear display, the fuel gauge, the warning lamps."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import ImageDraw

from tools.demo_model.canvas import Canvas, Type
from tools.demo_model.facts import Facts
from tools.demo_model.panels import random_type
from tools.demo_model.vocabulary import FUEL_SEGMENTS, GEARS, LAMPS, UNITS, Colour

AMBER: Colour = (255, 170, 20)
ALARM: Colour = (255, 40, 40)
LAMP_COLOUR = {"oil": AMBER, "battery": ALARM, "engine": AMBER, "brake": ALARM, "belt": AMBER}


@dataclass(frozen=True)
class Speedometer:
    """A dial with a needle on its rim and the speed and its unit as text in the middle."""

    speed: int
    unit: str
    radius: int
    kind: Type
    rim: Colour

    @property
    def width(self) -> int:
        return 2 * self.radius + 1

    @property
    def height(self) -> int:
        return 2 * self.radius + 1

    @property
    def facts(self) -> Facts:
        return Facts(speed=self.speed, unit=self.unit)

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        cx, cy, r = x + self.radius, y + self.radius, self.radius
        canvas.pen.ellipse((x, y, x + 2 * r, y + 2 * r), fill=(20, 20, 24), outline=self.rim, width=3)
        angle = math.pi * (0.8 + 1.4 * self.speed / 200)
        near, far = r * 0.72, r * 0.93
        tip = (cx + far * math.cos(angle), cy + far * math.sin(angle))
        canvas.pen.line((cx + near * math.cos(angle), cy + near * math.sin(angle), *tip), fill=(255, 60, 40), width=3)
        small = Type(self.kind.face, 14, 0.3)
        canvas.write_centred(cx, cy - self.kind.size, str(self.speed), self.kind, (255, 255, 255), "speed")
        canvas.write_centred(cx, cy + 6, self.unit.upper(), small, (205, 205, 205), "unit")


def sample_speedometer(rng: random.Random) -> Speedometer:
    """0 to 199 in one of two units."""
    rim = rng.choice(((220, 220, 220), (80, 170, 255), (230, 90, 40)))
    return Speedometer(rng.randint(0, 199), rng.choice(UNITS), rng.randint(44, 56), random_type(rng, 19, 26), rim)


@dataclass(frozen=True)
class GearDisplay:
    """One letter in a box."""

    gear: str
    side: int
    kind: Type
    ink: Colour

    @property
    def width(self) -> int:
        return self.side

    @property
    def height(self) -> int:
        return self.side

    @property
    def facts(self) -> Facts:
        return Facts(gear=self.gear)

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        box = (x, y, x + self.side - 1, y + self.side - 1)
        canvas.pen.rectangle(box, fill=(30, 30, 36), outline=(160, 160, 160), width=2)
        top = y + (self.side - self.kind.size * 1.2) / 2
        canvas.write_centred(x + self.side / 2, top, self.gear, self.kind, self.ink, "gear")


def sample_gear(rng: random.Random) -> GearDisplay:
    """One of P, R, N, D."""
    ink = rng.choice(((255, 230, 120), (240, 240, 240), (120, 255, 140)))
    return GearDisplay(rng.choice(GEARS), rng.randint(34, 42), random_type(rng, 20, 26), ink)


@dataclass(frozen=True)
class FuelGauge:
    """A row of five segments, lit from the left."""

    lit: int
    segment: int
    colour: Colour

    @property
    def width(self) -> int:
        return FUEL_SEGMENTS * (self.segment + 3) + 9

    @property
    def height(self) -> int:
        return self.segment + 10

    @property
    def facts(self) -> Facts:
        return Facts(fuel=self.lit * 100 // FUEL_SEGMENTS)

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        box = (x, y, x + self.width - 1, y + self.height - 1)
        canvas.pen.rectangle(box, fill=(24, 22, 24), outline=(120, 120, 120))
        for i in range(FUEL_SEGMENTS):
            left = x + 6 + i * (self.segment + 3)
            colour = self.colour if i < self.lit else (66, 66, 66)
            canvas.pen.rectangle((left, y + 5, left + self.segment, y + 5 + self.segment), fill=colour)
        canvas.mark(box, f"fuel_{self.lit}")


def sample_fuel(rng: random.Random) -> FuelGauge:
    """0 to 5 lit segments."""
    colour = rng.choice(((90, 200, 90), (240, 190, 60), (90, 190, 230)))
    return FuelGauge(rng.randint(0, FUEL_SEGMENTS), rng.randint(15, 20), colour)


@dataclass(frozen=True)
class LampPanel:
    """A dark panel on which the warning lamps that are on glow side by side."""

    lamps: tuple[str, ...]
    side: int

    @property
    def width(self) -> int:
        return 3 * (self.side + 12) + 4

    @property
    def height(self) -> int:
        return self.side + 14

    @property
    def facts(self) -> Facts:
        return Facts(lamps=self.lamps)

    def draw(self, canvas: Canvas, x: int, y: int) -> None:
        box = (x, y, x + self.width - 1, y + self.height - 1)
        canvas.pen.rounded_rectangle(box, 5, fill=(22, 20, 22), outline=(70, 60, 60), width=2)
        for i, lamp in enumerate(self.lamps):
            left, top = x + 8 + i * (self.side + 12), y + 7
            draw_lamp(canvas.pen, lamp, left, top, self.side)
            canvas.mark((left, top, left + self.side, top + self.side), f"lamp_{lamp}")


def draw_lamp(pen: ImageDraw.ImageDraw, lamp: str, x: int, y: int, side: int) -> None:
    """Draw the symbol of ``lamp`` in a square of ``side`` pixels with its top left at (x, y)."""
    colour = LAMP_COLOUR[lamp]
    third, right, bottom = side // 3, x + side, y + side
    if lamp == "oil":
        pen.polygon(
            ((x + side // 2, y), (right - 2, y + 2 * third), (x + side // 2, bottom), (x + 2, y + 2 * third)),
            fill=colour,
        )
    elif lamp == "battery":
        pen.rectangle((x, y + 5, right, bottom), outline=colour, width=3)
        pen.rectangle((x + 3, y, x + 8, y + 5), fill=colour)
        pen.rectangle((right - 8, y, right - 3, y + 5), fill=colour)
    elif lamp == "engine":
        pen.rectangle((x, y + third, right, bottom), fill=colour)
        pen.rectangle((x + third, y, right - third, y + third), fill=colour)
    elif lamp == "brake":
        pen.ellipse((x, y, right, bottom), outline=colour, width=3)
        pen.rectangle((x + side // 2 - 1, y + 6, x + side // 2 + 1, bottom - 6), fill=colour)
    else:
        pen.line((x, y, right, bottom), fill=colour, width=4)
        pen.line((right, y, x, bottom), fill=colour, width=4)


def sample_lamps(rng: random.Random) -> LampPanel:
    """0 to 3 lamps that are on."""
    return LampPanel(tuple(rng.sample(LAMPS, rng.choice((0, 1, 1, 2, 2, 3)))), rng.randint(22, 30))
