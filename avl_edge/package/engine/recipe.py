"""How to build: a recipe that comes with the package (``engines/``), one in a file, or the defaults."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ...config import parse_size
from ...errors import BadInput, quoted
from ...kv.layout import PAGE_ROWS
from ...machine.profile import BadProfile
from ...machine.profile.reader import parse
from ...resources import resource_files
from ..export import PRECISIONS
from .errors import BadRecipe

STORED = "stored"
MOST_PRUNED = 3840
"""TensorRT's TopK ends here, so a prompt that can be pruned does too."""


@dataclass(frozen=True)
class Recipe:
    """``precision`` of weights and arithmetic, "stored" for the checkpoint's own; ``prune_after`` the decoder layer
    (0-based) after which prompt tokens can be pruned, "never" for nowhere. The largest sizes that are served at once:
    ``images`` of one vision run, ``prompt_tokens`` of one prompt (at most the model's context), ``sequences`` of one
    decode step, ``pool_rows`` of the pool that they draw from, all layers together (at most what TensorRT addresses in
    one tensor). ``workspace``: the memory that TensorRT may give to a layer while it tries out kernels."""

    precision: str = STORED
    prune_after: int | Literal["never"] = 2
    images: int = 4
    prompt_tokens: int = 3072
    sequences: int = 16
    pool_rows: int = 262144
    workspace: str = "2GiB"

    def __post_init__(self) -> None:
        known = (STORED, *PRECISIONS)
        _require(self.precision in known, f"precision {self.precision!r} must be one of {', '.join(known)}")
        prune = self.prune_after
        _require(
            prune == "never" or (_is_whole(prune) and prune >= 0), f"prune_after {prune!r} must be a layer, or never"
        )
        for name, value in self.shapes.items():
            _require(_is_whole(value) and value >= 1, f"{name} {value!r} must be a whole number from 1")
        _require(self.pool_rows >= PAGE_ROWS, f"pool_rows {self.pool_rows} must be at least {PAGE_ROWS}, one page's")
        _require(
            prune == "never" or self.prompt_tokens <= MOST_PRUNED,
            f"prompt_tokens {self.prompt_tokens} must be at most {MOST_PRUNED}, or prune_after never",
        )
        try:
            _require(self.workspace_bytes > 0, "it must be more than nothing")
        except BadInput as error:
            raise BadRecipe(f"workspace: {error}") from None

    @property
    def workspace_bytes(self) -> int:
        return parse_size(str(self.workspace))

    @property
    def shapes(self) -> dict[str, int]:
        """The largest sizes, by name."""
        return {name: getattr(self, name) for name in ("images", "prompt_tokens", "sequences", "pool_rows")}


def shipped_recipes() -> dict[str, Path]:
    """The files of the recipes that come with the package, by name."""
    return {path.stem: path for path in resource_files("engines/*.yaml")}


def find_recipe(name: str) -> Recipe:
    """The recipe in the file ``name``, or the one of this name that comes with the package; else :class:`BadRecipe`."""
    if os.path.exists(name) and not os.path.isdir(name):
        return read_recipe(Path(name))
    known = shipped_recipes()
    if name not in known:
        raise BadRecipe(f"there is no recipe {quoted(name)}: give one of {', '.join(known)}, or a recipe's file")
    return read_recipe(known[name])


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file; :class:`BadRecipe` names the file and the key that is wrong."""
    try:
        content = parse(path.read_text(encoding="utf-8"), f"the recipe {path}")
    except OSError as error:
        raise BadRecipe(f"the recipe {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadRecipe(f"the recipe {path} is not UTF-8 text") from None
    except BadProfile as error:
        raise BadRecipe(str(error)) from None
    if not isinstance(content, dict):
        raise BadRecipe(f"the recipe {path} must hold names with values, like precision: float16")
    known = [field.name for field in fields(Recipe)]
    for key in content:
        if key not in known:
            raise BadRecipe(f"the recipe {path} has {key!r}, which is not known: use {', '.join(known)}")
    try:
        return Recipe(**content)
    except BadRecipe as error:
        raise BadRecipe(f"the recipe {path}: {error}") from None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise BadRecipe(message)
