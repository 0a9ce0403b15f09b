"""From a path, bytes or a Pillow picture to an RGB picture, or to one sentence that says why not.

Pictures come from people and from the network, so everything that can be refused by the header is refused before
a decoder runs, and only the decoder of the recognised format is ever tried.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

from PIL import Image, ImageOps

from ...errors import BadImage, BadInput
from .headers import SUPPORTED, declared_size, identify

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image

MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 100
_HEAD_BYTES = 64
_USE = "use JPEG, PNG, WebP or BMP"


def check_sources(images: Sequence[ImageSource]) -> None:
    """Raise BadInput for anything but a list of pictures: a path is a sequence too, of letters."""
    if isinstance(images, (str, bytes, os.PathLike)) or not isinstance(images, Sequence):
        raise BadInput("images must be a list of pictures: put a single one into brackets, as in [picture]")


def open_image(source: ImageSource) -> Image.Image:
    """The picture as a loaded Pillow image of mode RGB, its EXIF orientation applied.

    ``source`` is a path, the bytes of a file, or a Pillow image (which is left as it is). Transparency is dropped,
    not blended; a colour key stays in ``info["transparency"]`` for `preprocess`.

    Raises BadImage, naming the source, if it is missing, unreadable, damaged, animated, not JPEG, PNG, WebP or BMP,
    larger than MAX_PIXELS pixels, or longer than MAX_ASPECT_RATIO times its width (or the other way round).
    """
    if isinstance(source, Image.Image):
        return _convert(source, _picture_name(source), in_place=False)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "the picture")
    if not isinstance(source, str | os.PathLike):
        raise BadImage(f"a picture must be a path, bytes or a Pillow image, not {type(source).__name__}")
    with _open_file(source) as file:
        return _decode(file, f"'{os.fspath(source)}'")


def _picture_name(image: Image.Image) -> str:
    filename = getattr(image, "filename", "")
    return f"'{filename}'" if filename else "the picture"


def _open_file(source: str | os.PathLike[str]) -> BinaryIO:
    name = os.fspath(source)
    if not name:
        raise BadImage("the path of the picture is empty: give the path of a JPEG, PNG, WebP or BMP file")
    if re.match(r"(https?|ftp|data):", name):
        raise BadImage(f"'{name[:80]}' is an address, not a file: download the picture and give its path")
    path = Path(name)
    try:
        if path.is_dir():
            raise BadImage(f"'{name}' is a directory: give the path of one picture in it")
        if path.exists() and not path.is_file():
            raise BadImage(f"'{name}' is not a regular file: save the picture to a file first")
        return path.open("rb")
    except FileNotFoundError:
        raise BadImage(f"'{name}' does not exist: check the path of the picture") from None
    except PermissionError:
        raise BadImage(f"'{name}' cannot be read: check its permissions") from None
    except (OSError, ValueError) as error:
        raise BadImage(f"{name!r} cannot be opened: {_clean(error)}") from None


def _decode(file: BinaryIO, name: str) -> Image.Image:
    head = file.read(_HEAD_BYTES)
    kind = identify(head)
    if kind not in SUPPORTED:
        raise BadImage(_refusal(head, kind, name))
    size = declared_size(file, kind)
    if size is None or 0 in size:
        raise BadImage(f"{name} is damaged: its {kind} header is incomplete; save or download it again")
    _check_size(size, name)
    try:
        with Image.open(file, formats=[kind]) as image:
            _check_single_frame(image, name)
            return _convert(image, name, in_place=True)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they like on damaged data
        raise _damaged(name, error) from None


def _refusal(head: bytes, kind: str | None, name: str) -> str:
    if not head:
        return f"{name} is empty: save or download the picture again"
    if kind == "text":
        return f"{name} holds text, not a picture: {_USE}"
    if kind is None:
        return f"{name} is not a picture of a known format: {_USE}"
    return f"{name} cannot be used, {kind} is not supported: {_USE}"


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"{name} is too large: {width} x {height} pixels, more than {MAX_PIXELS // 10**6} megapixels; scale it down"
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise BadImage(
            f"{name} is too narrow: {width} x {height} pixels, an aspect ratio over {MAX_ASPECT_RATIO}:1; crop it"
        )


def _check_single_frame(image: Image.Image, name: str) -> None:
    # A JPEG of several frames is a camera's MPO: a still with its preview or second eye, and the first frame counts.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise BadImage(f"{name} is animated, which is not supported: save one frame of it as a picture")


def _convert(image: Image.Image, name: str, *, in_place: bool) -> Image.Image:
    """Loaded, upright and RGB; in place, a large picture is not copied more often than it must be.

    The size is checked here too: a header may differ from what its decoder found.
    """
    if 0 in image.size:
        raise BadImage(f"{name} has no pixels: {image.width} x {image.height}")
    _check_size(image.size, name)
    try:
        image.load()
        upright = _upright(image, in_place)
        if isinstance(upright.info.get("transparency"), bytes):
            # One opacity per palette entry has no meaning in RGB; without it Pillow converts without a warning.
            del upright.info["transparency"]
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged data
        raise _damaged(name, error) from None


def _upright(image: Image.Image, in_place: bool) -> Image.Image:
    if not in_place:
        return ImageOps.exif_transpose(image)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _damaged(name: str, error: Exception) -> BadImage:
    return BadImage(f"{name} is damaged and cannot be decoded ({_clean(error)}): save or download it again")


def _clean(error: Exception) -> str:
    """The error's text on one line, without the names and addresses of Python objects."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    text = re.sub(r"<[^<>]*\b0x[0-9a-fA-F]+[^<>]*>", "the data", text)
    return " ".join(re.sub(r"0x[0-9a-fA-F]{6,}", "", text).split())[:200]
