"""Fonts from Python packages, so that a fresh machine draws the same pictures without system fonts."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

# (package, folder inside it, file). All are development dependencies.
FACES = (
    ("matplotlib", "mpl-data/fonts/ttf", "DejaVuSans-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf", "DejaVuSansMono-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf", "DejaVuSans.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf", "DejaVuSerif-Bold.ttf"),
    ("font_roboto", "files", "Roboto-Bold.ttf"),
    ("font_roboto", "files", "Roboto-Medium.ttf"),
    ("font_source_sans_pro", "files", "SourceSansPro-Bold.ttf"),
    ("font_source_sans_pro", "files", "SourceSansPro-Semibold.ttf"),
)


class MissingFont(RuntimeError):
    """A font package of the development dependencies is not installed."""


@cache
def _path(face: int) -> Path:
    package, folder, file = FACES[face]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingFont(f"the package {package!r} is not installed: install the development dependencies")
    return Path(spec.submodule_search_locations[0]) / folder / file


@cache
def font(face: int, size: int) -> ImageFont.FreeTypeFont:
    """The font number ``face`` of FACES at ``size`` pixels; the same on every platform (basic layout)."""
    return ImageFont.truetype(str(_path(face)), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def advance(face: int, size: int, character: str) -> float:
    """How far the pen moves after ``character``, in pixels."""
    return font(face, size).getlength(character)
