"""What a LLaVA-1.6 checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ....errors import BadModel, quoted
from ...config_fields import Fields
from ...sizes import VisionShape
from ..llava.spec import DEFAULTS, ClipModelSpec, read_fields
from .pictures import AnyRes

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_MOST_TILES, _MOST_GRIDS = 64, 64


@dataclass(frozen=True)
class LlavaNextSpec(ClipModelSpec):
    """A LLaVA-1.6 checkpoint. ``grids``: the (rows, columns) of tiles in which a picture may be seen."""

    codec: ClassVar[str] = f"{__package__}.codec"
    network: ClassVar[str] = f"{__package__}.network"
    prefixes: ClassVar[Mapping[str, str]] = {"model.image_newline": "newline", "image_newline": "newline"}

    grids: tuple[tuple[int, int], ...]

    @property
    def picture(self) -> AnyRes:
        return AnyRes(self.vision.image_size, self.vision.image_size // self.vision.patch_size, self.grids)

    @property
    def vision_shape(self) -> VisionShape:
        shape = super().vision_shape
        return replace(shape, outside=shape.outside + self.text.hidden_size)  # the newline


def read(config: Fields, directory: Path) -> LlavaNextSpec:  # noqa: ARG001
    """The spec of a config.json."""
    config.one_of("vision_feature_select_strategy", ("default",), "default")  # tiles with class tokens make no grid
    fields = read_fields(config.with_defaults(DEFAULTS))
    pinpoints = config.get("image_grid_pinpoints") or _PINPOINTS
    return LlavaNextSpec(**fields, grids=_grids(pinpoints, fields["vision"].image_size))


def _grids(pinpoints: Any, side: int) -> tuple[tuple[int, int], ...]:
    sizes = pinpoints if isinstance(pinpoints, list) and len(pinpoints) <= _MOST_GRIDS else [pinpoints]
    for size in sizes:
        if not isinstance(size, list) or len(size) != 2 or not _is_tiled(size[0], size[1], side):
            raise BadModel(
                f"config.json: image_grid_pinpoints must be up to {_MOST_GRIDS} sizes [height, width] in whole tiles "
                f"of {side} pixels, not {quoted(size)}"
            )
    return tuple((high // side, wide // side) for high, wide in sizes)


def _is_tiled(high: Any, wide: Any, side: int) -> bool:
    """Whether these are the height and width of whole tiles, and not of too many."""
    whole = all(type(edge) is int and edge > 0 and edge % side == 0 for edge in (high, wide))
    return whole and high * wide <= _MOST_TILES * side**2
