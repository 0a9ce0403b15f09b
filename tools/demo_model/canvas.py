"""A picture that is drawn together with what is seen in each of its patches."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tools.demo_model.fonts import advance, font
from tools.demo_model.vocabulary import CHARACTER_ID, FIELD_ID, NUM_INDICES, OBJECT_ID, Colour

SIZE = 336
PATCH = 14
GRID = SIZE // PATCH
HALF = PATCH // 2
# Two characters whose centres are at least half a patch apart never share a label.
MIN_ADVANCE = float(HALF)
SPACE = 7.0


@dataclass(frozen=True)
class Type:
    """A typeface at a size in pixels, with extra room between the letters."""

    face: int
    size: int
    spacing: float = 0.3

    def step(self, character: str) -> float:
        """Width that ``character`` takes in a line, in pixels."""
        if character == " ":
            return SPACE
        return max(MIN_ADVANCE, advance(self.face, self.size, character) + self.spacing)

    def width(self, text: str) -> float:
        """Width of a line, in pixels."""
        return sum(self.step(c) for c in text)

    @property
    def height(self) -> int:
        """Height that a line needs, in pixels."""
        return int(self.size * 1.25)


class Canvas:
    """An RGB picture with auxiliary labels.

    ``text_labels`` is int64 ``[GRID, 2 * GRID, 3]``: character, field and place in its line, per half patch;
    ``object_labels`` is int64 ``[GRID, GRID]``. Zero is "nothing".
    """

    def __init__(self, background: Image.Image) -> None:
        self.image = background
        self.pen = ImageDraw.Draw(background)
        self.text_labels: npt.NDArray[np.int64] = np.zeros((GRID, 2 * GRID, 3), np.int64)
        self.object_labels: npt.NDArray[np.int64] = np.zeros((GRID, GRID), np.int64)

    def write(self, x: float, y: float, text: str, kind: Type, colour: Colour, field: str) -> None:
        """Write ``text`` with its top left at (x, y) and label every character as part of ``field``."""
        face = font(kind.face, kind.size)
        middle = y + kind.size * 0.57  # half-way up a capital, for all faces within a pixel
        for index, character in enumerate(text):
            step = kind.step(character)
            if character != " ":
                left = x + (step - advance(kind.face, kind.size, character)) / 2
                self.pen.text((left, y), character, font=face, fill=colour)
                self._label(x + step / 2, middle, character, field, index)
            x += step

    def write_centred(self, x: float, y: float, text: str, kind: Type, colour: Colour, field: str) -> None:
        """Write ``text`` centred on column x with its top at y."""
        self.write(x - kind.width(text) / 2, y, text, kind, colour, field)

    def _label(self, x: float, y: float, character: str, field: str, index: int) -> None:
        row, column = int(y // PATCH), int(x // HALF)
        if character in CHARACTER_ID and 0 <= row < GRID and 0 <= column < 2 * GRID:
            place = min(index + 1, NUM_INDICES - 1)
            self.text_labels[row, column] = (CHARACTER_ID[character], FIELD_ID[field], place)

    def mark(self, box: tuple[float, float, float, float], name: str) -> None:
        """Label the patches that ``box`` (left, top, right, bottom) covers by at least half as object ``name``."""
        left, right = _patches(box[0], box[2])
        top, bottom = _patches(box[1], box[3])
        self.object_labels[top : bottom + 1, left : right + 1] = OBJECT_ID[name]


def _patches(low: float, high: float) -> tuple[int, int]:
    first, last = int((low + HALF) // PATCH), int((high - HALF) // PATCH)
    if last < first:
        first = last = int((low + high) / 2 // PATCH)
    return max(first, 0), min(last, GRID - 1)


def gradient_background(rng: random.Random, noise: np.random.Generator) -> Image.Image:
    """A shaded, slightly striped background in a random colour."""
    base = np.array([rng.randint(50, 165) for _ in range(3)], np.float32)
    slope = np.linspace(-1, 1, SIZE, dtype=np.float32) * rng.uniform(-35, 35)
    stripes = noise.normal(0, 3, (1, SIZE, 1)).astype(np.float32)
    pixels = base[None, None, :] + slope[:, None, None] + stripes
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def road_background(rng: random.Random, noise: np.random.Generator) -> Image.Image:
    """Sky above, ground below and a road that narrows towards the horizon."""
    image = gradient_background(rng, noise)
    pen = ImageDraw.Draw(image)
    horizon = rng.randint(90, 170)
    grey = rng.randint(60, 110)
    sky = (rng.randint(110, 170), rng.randint(150, 200), rng.randint(190, 235))
    pen.rectangle((0, 0, SIZE, horizon), fill=sky)
    middle, near = rng.randint(120, 216), rng.randint(120, 220)
    road = [(middle - 8, horizon), (middle + 8, horizon), (middle + near, SIZE), (middle - near, SIZE)]
    pen.polygon(road, fill=(grey, grey, grey + 4))
    pen.line((middle, horizon, middle, SIZE), fill=(220, 220, 200), width=3)
    return image
