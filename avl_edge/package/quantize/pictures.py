"""The pictures that scales are made from, as prompts."""

from __future__ import annotations

from pathlib import Path

from ...config import require
from ...model.prompt import Processor
from ...request import Prompt

MOST_PICTURES = 32
QUESTION = "Describe this picture in detail."
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def calibration_prompts(folder: Path, processor: Processor) -> list[Prompt]:
    """A question about each of the first :data:`MOST_PICTURES` pictures of ``folder``, by name; :class:`BadInput` for a
    folder without any, :class:`~avl_edge.errors.BadImage` for one that cannot be read."""
    require(folder.is_dir(), f"{folder} is no folder: give --calibration a folder of pictures")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)[:MOST_PICTURES]
    require(bool(files), f"{folder} has no pictures ({', '.join(_SUFFIXES)}): give --calibration a folder of some")
    return [processor([file], QUESTION) for file in files]
