"""Scenes: a picture drawn from a seed, what is true about it, and what is seen in each of its patches.

``python -m tools.demo_model.scenes --examples`` draws the sample pictures of the repository.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image, ImageFilter

from tools.demo_model.canvas import SIZE, Canvas, gradient_background, road_background
from tools.demo_model.facts import Facts
from tools.demo_model.instruments import sample_fuel, sample_gear, sample_lamps, sample_speedometer
from tools.demo_model.panels import Item, sample_plate, sample_screen, sample_sign, sample_thermometer
from tools.demo_model.street import sample_cars, sample_light, sample_limit

# Every use of a seed has its own range: nothing that is measured or shown is ever trained on.
TRAINING_SEEDS = range(10**12)
HELD_OUT_SEEDS = range(10**12, 2 * 10**12)
EXAMPLE_SEEDS = range(2 * 10**12, 3 * 10**12)
VALIDATION_SEEDS = range(3 * 10**12, 4 * 10**12)

Box = tuple[int, int, int, int]
Sampler = Callable[[random.Random], Item]
MARGIN = 3
TRIES = 80
_GRAIN_SIZE = 640

COCKPIT: tuple[Sampler, ...] = (
    sample_screen,
    sample_speedometer,
    sample_gear,
    sample_fuel,
    sample_lamps,
    sample_thermometer,
)
STREET: tuple[Sampler, ...] = (sample_sign, sample_plate, sample_limit, sample_light, sample_cars)


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    ``image`` is RGB 336 x 336; ``text_labels`` int64 ``[24, 48, 3]``; ``object_labels`` int64 ``[24, 24]``.
    """

    image: Image.Image
    facts: Facts
    text_labels: npt.NDArray[np.int64]
    object_labels: npt.NDArray[np.int64]


def _overlaps(a: Box, b: Box) -> bool:
    return a[0] < b[2] + MARGIN and b[0] < a[2] + MARGIN and a[1] < b[3] + MARGIN and b[1] < a[3] + MARGIN


def _find_place(rng: random.Random, width: int, height: int, taken: list[Box]) -> Box | None:
    """A free box of the given size, or None if a number of tries found none."""
    for _ in range(TRIES):
        x = rng.randint(MARGIN, max(MARGIN, SIZE - MARGIN - width))
        y = rng.randint(MARGIN, max(MARGIN, SIZE - MARGIN - height))
        box = (x, y, x + width, y + height)
        if not any(_overlaps(box, other) for other in taken):
            return box
    return None


def _choose_samplers(rng: random.Random) -> list[Sampler]:
    """Mostly a mixture of everything; sometimes only the cockpit or only the street."""
    theme = rng.random()
    if theme < 0.12:
        return list(COCKPIT)
    if theme < 0.24:
        return list(STREET)
    return [sampler for sampler in COCKPIT + STREET if rng.random() < 0.9]


@lru_cache(maxsize=1)
def _grain() -> npt.NDArray[np.float32]:
    """Gaussian noise that pictures cut their grain from: drawing new noise would cost more than the picture."""
    return np.random.default_rng(0).standard_normal((_GRAIN_SIZE, _GRAIN_SIZE, 3), dtype=np.float32)


def _photograph(image: Image.Image, rng: random.Random, noise: np.random.Generator) -> Image.Image:
    """The light, blur and grain of a camera."""
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    pixels = np.asarray(image, np.float32)
    tint = np.array([rng.uniform(0.94, 1.06) for _ in range(3)], np.float32) * rng.uniform(0.78, 1.12)
    top, left = noise.integers(0, _GRAIN_SIZE - SIZE, 2)
    grain = _grain()[top : top + SIZE, left : left + SIZE] * rng.uniform(0, 7)
    return Image.fromarray(np.clip(pixels * tint + grain, 0, 255).astype(np.uint8))


def _arrange(rng: random.Random, samplers: list[Sampler]) -> list[tuple[Item, int, int]]:
    """Sample the items and place them where there is room, the largest first; one that finds none is left out."""
    items = [sampler(rng) for sampler in samplers]
    placed, taken = list[tuple[Item, int, int]](), list[Box]()
    for item in sorted(items, key=lambda item: -item.width * item.height):
        box = _find_place(rng, item.width, item.height, taken)
        if box is not None:
            taken.append(box)
            placed.append((item, box[0], box[1]))
    return placed


def _facts(placed: list[tuple[Item, int, int]]) -> Facts:
    facts = Facts()
    for item, _, _ in placed:
        facts = facts.merged(item.facts)
    return facts


def compose(seed: int, samplers: list[Sampler] | None = None, road: bool | None = None) -> Scene:
    """Draw the scene of ``seed``; ``samplers`` and ``road`` fix what is in it instead of chance.

    Questions about an item that is not in the picture are answered with "not visible".
    """
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    wanted = _choose_samplers(rng)
    on_road = rng.random() < 0.4
    placed = _arrange(rng, wanted if samplers is None else samplers)
    background = road_background if (on_road if road is None else road) else gradient_background
    canvas = Canvas(background(rng, noise))
    for item, x, y in placed:
        item.draw(canvas, x, y)
    image = _photograph(canvas.image, rng, noise)
    return Scene(image, _facts(placed), canvas.text_labels, canvas.object_labels)


def facts_of(seed: int) -> Facts:
    """The facts of the scene of ``seed`` without drawing it."""
    rng = random.Random(seed)
    wanted = _choose_samplers(rng)
    rng.random()
    return _facts(_arrange(rng, wanted))


def render(seed: int) -> Scene:
    """The scene of ``seed``; the same on every call."""
    return compose(seed)


def draw_examples(folder: Path) -> None:
    """Draw the sample pictures and print what is in them."""
    first = EXAMPLE_SEEDS.start
    scenes = {
        "cockpit.png": compose(first + 147, list(COCKPIT), road=False),
        "road.jpg": compose(first + 20, list(STREET), road=True),
        "screen.png": compose(first + 327, [sample_screen, sample_gear, sample_thermometer], road=False),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in scenes.items():
        scene.image.save(folder / name, quality=95)
        typer.echo(f"{folder / name}: {json.dumps(asdict(scene.facts))}")


def main(
    examples: Annotated[bool, typer.Option(help="Draw the sample pictures of the repository.")] = False,
    seed: Annotated[int, typer.Option(help="First seed of the pictures to draw.")] = HELD_OUT_SEEDS.start,
    count: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("examples"),
) -> None:
    """Draw scenes as PNG files and print what is in them."""
    if examples:
        draw_examples(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(seed, seed + count):
        scene = render(number)
        scene.image.save(folder / f"scene_{number}.png")
        typer.echo(f"{number}: {json.dumps(asdict(scene.facts))}")


if __name__ == "__main__":
    typer.run(main)
