"""What a picture may be given as in Python, and what is made of it: a path, the bytes of a file, or a Pillow image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...errors import BadImage, BadInput

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture as an array of uint8 or uint16 (of which the high byte counts): ``[height, width]`` in grey, or
    ``[height, width, channels]`` with 1, 3 or 4 of them, the fourth its opacity. ``order`` of the first three: "RGB",
    or "BGR" as OpenCV reads pictures and cameras."""

    array: Array
    order: str = "RGB"


ImageSource: TypeAlias = "os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Array | Frame | Image.Image"
"""A string is none: what comes from a client must not name a file by being passed on. An array alone is in RGB."""
TakenSource: TypeAlias = "os.PathLike[str] | bytes | Image.Image"
"""What may be read twice: once for its size, once for its pixels."""

_SHAPES = "[height, width] or [height, width, channels] with 1, 3 or 4 channels"


def is_list_of_sources(images: object) -> bool:
    """Whether several pictures are given, and not a single one without its brackets."""
    single = (str, bytes, bytearray, memoryview, os.PathLike, np.ndarray)
    return isinstance(images, Sequence) and not isinstance(images, single)


def check_sources(images: object) -> None:
    """Raise BadInput for anything but a list of pictures, as far as that is told without reading any."""
    if not is_list_of_sources(images):
        raise BadInput("images must be a list of pictures: put a single one into brackets, as in [picture]")
    for each in images:  # type: ignore[attr-defined]
        check_source(each)


def check_source(source: object) -> None:
    """Raise BadInput for a string, BadImage for what cannot be a picture; nothing is read."""
    if isinstance(source, str):
        raise BadInput("a picture cannot be given as a string: for a file give pathlib.Path(...), or give its bytes")
    known = (bytes, bytearray, memoryview, os.PathLike, np.ndarray, Frame, Image.Image)
    if not isinstance(source, known) and not callable(getattr(source, "read", None)):
        raise BadImage(
            f"a picture must be a pathlib.Path, bytes, a binary stream, a numpy array or a Pillow image, not "
            f"{type(source).__name__}"
        )


def taken_array(frame: Frame, max_pixels: int) -> Image.Image:
    """An array as a picture, which may share its memory; BadImage for anything but what :class:`Frame` says, and for
    more than ``max_pixels``."""
    array, order = frame.array, frame.order
    if not isinstance(array, np.ndarray):
        raise BadInput(f"a frame holds a numpy array, not {type(array).__name__}")
    if order not in ("RGB", "BGR"):
        raise BadInput(f"the order of a frame's channels is 'RGB' or 'BGR', not {order!r}")
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        cure = "move its channels to the end" if first else f"give {_SHAPES}"
        raise BadImage(f"a picture as an array cannot have the shape {list(array.shape)}: {cure}")
    if array.dtype not in (np.uint8, np.uint16):
        raise BadImage(
            f"a picture as an array must be of uint8 or uint16, not {array.dtype}: scale its values to 0..255"
        )
    if array.shape[0] * array.shape[1] > max_pixels:
        raise BadImage(f"a picture of {array.shape[1]} x {array.shape[0]} pixels is too large: scale it down")
    if 0 in array.shape:
        raise BadImage(f"a picture has no pixels: {array.shape[1]} x {array.shape[0]}")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if channels == 1:
        array = array.reshape(array.shape[:2])
    elif order == "BGR":
        array = array[..., [2, 1, 0, 3][:channels]]
    return Image.fromarray(np.ascontiguousarray(array))
