"""Pictures that the demo model was not made for: drawn by matplotlib, with its own fonts, layout and smoothing.

``python -m tools.demo_model.foreign --json`` asks the shipped model about each and prints what it said beside what is
there. ``--folder`` keeps the pictures.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from PIL import Image

from avl_edge import Options, Runtime

INCHES, DPI = 6, 100  # camera pictures are larger than the model's 336 pixels, and are scaled down


def _gauge(axes: Axes) -> None:
    """A round speedometer with numbers on its rim, as dashboards have them."""
    axes.add_patch(Circle((50, 50), 44, facecolor="#101418", edgecolor="#c0c8d0", linewidth=3))
    for value in range(0, 201, 20):
        angle = np.radians(225 - 270 * value / 200)
        x, y = 50 + 36 * np.cos(angle), 50 + 36 * np.sin(angle)
        axes.text(x, y, str(value), color="white", fontsize=11, ha="center", va="center")
    angle = np.radians(225 - 270 * 96 / 200)
    axes.plot([50, 50 + 28 * np.cos(angle)], [50, 50 + 28 * np.sin(angle)], color="#ff4030", linewidth=4)
    axes.text(50, 32, "96", color="white", fontsize=34, fontweight="bold", ha="center", va="center")
    axes.text(50, 22, "KM/H", color="#a0a8b0", fontsize=15, ha="center", va="center")


def _sign(axes: Axes) -> None:
    """A blue motorway sign under a sky."""
    axes.imshow(np.linspace(0.5, 0.9, 50)[:, None], extent=(0, 100, 0, 100), cmap="Blues_r", vmin=0, vmax=1.2)
    axes.add_patch(FancyBboxPatch((15, 30), 70, 42, boxstyle="round,pad=3", facecolor="#0a3c96", edgecolor="white"))
    for y, (place, distance) in zip((60, 42), (("BERN", "42"), ("ZURICH", "118")), strict=True):
        axes.text(18, y, place, color="white", fontsize=26, fontweight="bold", va="center")
        axes.text(82, y, distance, color="white", fontsize=26, fontweight="bold", va="center", ha="right")


def _screen(axes: Axes) -> None:
    """A dark screen with three lines."""
    axes.add_patch(FancyBboxPatch((12, 25), 76, 50, boxstyle="round,pad=2", facecolor="#101820", edgecolor="#606870"))
    for y, line in zip((66, 50, 34), ("RADIO NEWS", "14:35 ANNA", "RAIN"), strict=True):
        axes.text(16, y, line, color="#e0f0ff", fontsize=24, family="monospace", va="center")


PICTURES: dict[str, tuple[Callable[[Axes], None], tuple[tuple[str, str], ...]]] = {
    "gauge": (_gauge, (("What is the speed?", "96 km/h"), ("Which gear is it in?", "not visible"))),
    "sign": (_sign, (("What does the sign say?", "BERN 42 km, ZURICH 118 km"), ("How far is it to BERN?", "42 km"))),
    "screen": (_screen, (("Read the screen.", "RADIO NEWS, 14:35 ANNA, RAIN"), ("How many lines has it?", "3"))),
}


def draw(paint: Callable[[Axes], None]) -> Image.Image:
    """One picture, RGB 600 x 600."""
    figure = Figure(figsize=(INCHES, INCHES), dpi=DPI, facecolor="#405048")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    paint(axes)
    axes.set(xlim=(0, 100), ylim=(0, 100))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def main(
    model: Annotated[str, typer.Option(help="Model name or directory.")] = "demo",
    folder: Annotated[Path | None, typer.Option(help="Keep the pictures here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask the model about pictures of another program."""
    runtime = Runtime.load(model)
    rows = []
    for name, (paint, questions) in PICTURES.items():
        image = draw(paint)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{name}.png")
        for question, truth in questions:
            said = runtime.generate([image], question, Options(max_new_tokens=80)).result().text.strip()
            rows.append({"picture": name, "question": question, "truth": truth, "said": said})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['picture']}: {row['question']} | {row['truth']} | {row['said']}")


if __name__ == "__main__":
    typer.run(main)
