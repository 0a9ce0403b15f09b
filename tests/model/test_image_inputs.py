"""What a picture may be given as in Python: streams, buffers, arrays, frames of OpenCV."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avl_edge import Frame
from avl_edge.errors import BadImage, BadInput
from avl_edge.model.images import take_sources
from avl_edge.model.images.sources import image_size, open_flat
from tests.model.test_image_kinds import NOISE, PNG, arrays


def test_arrays_streams_and_buffers_are_taken(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(PNG)
    sources: list[Any] = [io.BytesIO(PNG), memoryview(PNG), bytearray(PNG), NOISE, Frame(NOISE)]
    sources += [Frame(NOISE[..., ::-1], "BGR"), np.asfortranarray(NOISE), NOISE.astype(np.uint16) * 256]
    with (tmp_path / "picture.png").open("rb") as file:
        taken = take_sources([*sources, file])
    for each in taken:
        assert image_size(each) == (64, 48)
        assert np.array_equal(arrays(each)[0], NOISE)
    opaque = np.dstack([NOISE[..., ::-1], np.full((48, 64), 9, np.uint8)])
    image, share = open_flat(Frame(opaque, "BGR"))
    assert share == 1
    assert np.array_equal(np.asarray(image), NOISE)
    assert np.array_equal(arrays(NOISE[..., 0])[0], arrays(NOISE[..., :1])[0])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (NOISE.transpose(2, 0, 1), "move its channels to the end"),
        (NOISE[None], r"cannot have the shape \[1, 48, 64, 3\]"),
        (NOISE / 255, "uint8 or uint16, not float64"),
        (np.zeros((0, 8), np.uint8), "no pixels"),
        (np.broadcast_to(np.uint8(0), (9000, 9000)), "too large"),
        (io.StringIO("x"), "open the file in mode 'rb'"),
    ],
)
def test_arrays_and_streams_that_are_no_picture_are_refused(source: Any, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        take_sources([source])


def test_frames_of_another_order_and_a_single_array_are_refused() -> None:
    with pytest.raises(BadInput, match="'RGB' or 'BGR'"):
        take_sources([Frame(NOISE, "GBR")])
    with pytest.raises(BadInput, match="into brackets"):
        take_sources(NOISE)  # type: ignore[arg-type]
