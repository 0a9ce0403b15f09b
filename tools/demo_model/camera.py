"""The demo's questions about pictures without an even background: ``python -m tools.demo_model.camera FOLDER``.

A drawn picture has flat areas, where one row of the cache is much like the next; a camera's has light that falls off,
texture and noise. This puts such light and noise over the held-out pictures, stores them as JPEG and writes a
``questions.jsonl`` for ``avl-edge eval --data``. The model was trained on nothing like it, so full attention too
answers worse; what can be compared is how much of that each method keeps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from .evaluate import held_out
from .scenes import render

_PATCHES = 24
"""The light changes over a 24th of the picture: 14 pixels of 336, one image token."""


def as_seen(picture: Image.Image, strength: float, seed: int) -> Image.Image:
    """An RGB picture under uneven light, colour by colour, with a standard deviation of about ``strength`` of 255
    levels, and under noise of a third of that."""
    random = np.random.default_rng(seed)
    light = Image.fromarray(random.integers(0, 256, (_PATCHES, _PATCHES, 3), dtype=np.uint8))
    uneven = np.asarray(light.resize(picture.size, Image.Resampling.BICUBIC), dtype=np.float64)
    uneven = (uneven - uneven.mean()) / uneven.std()
    noise = random.normal(0, 1 / 3, uneven.shape)
    seen = np.asarray(picture.convert("RGB")) + strength * (uneven + noise)
    return Image.fromarray(seen.clip(0, 255).round().astype(np.uint8))


def main(
    folder: Annotated[Path, typer.Argument(help="Where the pictures and questions.jsonl go.")],
    seed: Annotated[int, typer.Option(min=0)] = 1,
    questions: Annotated[int, typer.Option(min=1)] = 300,
    strength: Annotated[float, typer.Option(min=0, help="Standard deviation of the light, of 255 levels.")] = 12,
) -> None:
    """Draw the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: set[int] = set()
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as lines:
        for number, question in held_out(seed, questions):
            name = f"scene_{number}.jpg"
            if number not in drawn:
                drawn.add(number)
                as_seen(render(number).image, strength, number).save(folder / name, quality=90)
            row = {"image": name, "question": question.text, "answers": [question.answer], "kind": question.kind}
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
