"""A family of models that the package does not know: pictures of any size are cut into cells, of which each is a token
that says its mean colour; half of what it says is added once more behind the decoder's first layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from avl_edge.config import Picture
from avl_edge.model.config_fields import Fields
from avl_edge.model.prompt.codec import ImageCodec
from avl_edge.model.sizes import ModelShape, VisionShape
from avl_edge.model.spec import ModelSpec
from avl_edge.model.text_config import read_text

PUBLISHED: tuple[ModelShape, ...] = ()


@dataclass(frozen=True)
class Cells:
    cell: int

    def __call__(self, width: int, height: int) -> Picture:
        rows, columns = max(1, height // self.cell), max(1, width // self.cell)
        return Picture(1, rows * columns, rows * columns, rows, columns)

    def heaviest(self, tokens: int) -> list[Picture]:
        return [Picture(1, tokens, tokens, 1, tokens)] if tokens else []


@dataclass(frozen=True)
class CellCodec(ImageCodec):
    rule: Cells

    def pixels(
        self,
        image: Image.Image,
        picture: Picture,
        max_pixels: int,  # noqa: ARG002
    ) -> npt.NDArray[np.float32]:
        small = image.resize((picture.columns, picture.rows), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.float32).reshape(-1, 3) / 255


@dataclass(frozen=True)
class ToySpec(ModelSpec):
    codec: ClassVar[str] = __name__
    network: ClassVar[str] = f"{__package__}.network"
    prefixes: ClassVar[dict[str, str]] = {"toy.": "vision."}

    cell: int

    @property
    def picture(self) -> Cells:
        return Cells(self.cell)

    def pixel_bytes(self, picture: Picture) -> int:
        return 4 * 3 * picture.tokens

    @property
    def vision_shape(self) -> VisionShape:
        return VisionShape(3, 1, 1, self.cell, 3 * self.text.hidden_size, 0)


def open_codec(spec: ToySpec, directory: Path) -> CellCodec:  # noqa: ARG001
    return CellCodec(spec.picture)


def read(config: Fields, directory: Path) -> ToySpec:  # noqa: ARG001
    text = read_text(config.section("text_config"), tied=False)
    return ToySpec(text, config.size("image_token_id"), config.size("cell"))
