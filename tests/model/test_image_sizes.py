"""What is known of a picture before and beside its pixels: its upright size, and a digest that tells it apart."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from avl_edge.config import Picture
from avl_edge.errors import BadImage, BadInput
from avl_edge.model.images import open_image
from avl_edge.model.images.preprocess import digest
from avl_edge.model.images.sources import image_size
from avl_edge.request import PixelValues
from tests.equipment.checkpoints import random_image


def _file(kind: str, orientation: int | None, mode: str = "RGB") -> bytes:
    image, file = random_image(1, (90, 60)).convert(mode), io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(file, kind, exif=exif if orientation else b"")
    return file.getvalue()


@pytest.mark.parametrize("orientation", [None, *range(1, 9), 77])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_size_is_that_of_the_picture_once_it_is_decoded(tmp_path: Path, kind: str, orientation: int | None) -> None:
    content = _file(kind, orientation)
    (tmp_path / "picture").write_bytes(content)
    sources: list[Any] = [content, tmp_path / "picture", Image.open(io.BytesIO(content))]
    for source in sources:
        assert image_size(source) == open_image(source).size
    assert image_size(content) == ((60, 90) if orientation in (5, 6, 7, 8) else (90, 60))


def test_an_orientation_behind_the_pixels_counts_too() -> None:
    """As PNG allows it."""
    content, exif = _file("PNG", None), Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    turned = content[:-12] + chunk + content[-12:]
    assert image_size(turned) == open_image(turned).size == (60, 90)


def test_nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [_file("PNG", None), _file("JPEG", 6), _file("BMP", None)]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    assert [image_size(each) for each in contents] == [(90, 60), (60, 90), (90, 60)]


def test_what_is_no_picture_is_refused_as_it_is_where_it_is_decoded(tmp_path: Path) -> None:
    sources: list[Any] = [b"", b"GIF89a", "a.png", 7, tmp_path / "none.png", tmp_path, _file("PNG", None)[:30]]
    for source in sources:
        with pytest.raises((BadImage, BadInput)) as expected:
            open_image(source)
        with pytest.raises(type(expected.value)) as found:
            image_size(source)
        assert str(found.value) == str(expected.value)


def test_digest_tells_pictures_apart_by_their_pixels_and_shapes() -> None:
    one, two = (np.asarray(random_image(seed, (50, 40)), dtype=np.float32) for seed in (0, 1))
    plain, flat = Picture(1, 4, 4), np.zeros((2, 8), np.float32)

    def of(values: Any, picture: Picture = plain) -> str:
        return digest(PixelValues(values, picture))

    assert of(one) == of(one.copy(order="F")) != of(two)
    assert len(of(one)) == 64
    assert len({of(flat), of(flat.reshape(8, 2)), of(flat, replace(plain, rows=4))}) == 3
