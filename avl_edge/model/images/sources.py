"""From whatever a picture is given as to an RGB picture, or to one sentence that says why not.

Pictures come from people and from the network, so what would cost memory or time is refused by the file's size and its
headers before a decoder runs, and only the decoder of the recognised format is ever tried. What was checked is what is
decoded: a file is read once, as it is at that moment.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageChops

from ...config import format_size
from ...errors import BadImage, reason, refusing
from ...files import read_bytes
from .headers import MOST_PARTS, SUPPORTED, Header, identify, read_header
from .inputs import Frame, ImageSource, TakenSource, check_source, check_sources, taken_array
from .metadata import orientation, upright, without_metadata
from .transparency import flattened
from .unended import has_all_scans, variants

MAX_BYTES = 256 * 2**20
"""Of a file: a BMP of :data:`MAX_PIXELS` with four bytes each."""
MAX_PIXELS = 64_000_000
DECODING_BYTES_PER_PIXEL = 24
"""Of the largest picture that is read: its file, once more without its metadata, and four copies of four bytes (Pillow
holds RGB as four), which transparency makes; a turned JPEG makes three."""
MAX_ASPECT_RATIO = 100
MAX_SCANNED_PIXELS = 16 * MAX_PIXELS
"""Pixels times scans of a progressive JPEG, each of which costs 0.6 ns. A file of 12 MP may have 85; encoders write
10."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_HEAD_BYTES = 64
_USE = "use JPEG, PNG, WebP or BMP"
_CONVERTERS = {
    "HEIC": " (heif-convert makes a JPEG of it)",
    "HEIF": " (heif-convert makes a JPEG of it)",
    "AVIF": " (avifdec makes a PNG of it)",
    "JPEG XL": " (djxl makes a JPEG of it)",
    "MP4 video": " (ffmpeg makes pictures of its frames)",
    "QuickTime video": " (ffmpeg makes pictures of its frames)",
}


def take_sources(images: Sequence[ImageSource], max_pixels: int = MAX_PIXELS) -> list[TakenSource]:
    """Each picture as what may be read twice: streams are read to their end, and arrays become pictures.

    Raises BadInput for anything but a list of pictures, BadImage for one that cannot be any.
    """
    check_sources(images)
    return [_taken(image, max_pixels) for image in images]


def _taken(source: Any, max_pixels: int) -> TakenSource:
    check_source(source)
    if isinstance(source, bytes | os.PathLike | Image.Image):
        return source
    if isinstance(source, bytearray | memoryview):
        size = len(source) if isinstance(source, bytearray) else source.nbytes
        if size > _most_bytes(max_pixels):
            raise _too_many_bytes("the picture", _most_bytes(max_pixels))
        return bytes(source)
    if isinstance(source, np.ndarray | Frame):
        return taken_array(source if isinstance(source, Frame) else Frame(source), max_pixels)
    return _taken_stream(source, max_pixels)


def _taken_stream(source: Any, max_pixels: int) -> bytes:
    try:
        if isinstance(source.read(0), str):
            raise BadImage("a picture cannot be read from a stream of text: open the file in mode 'rb'")
        return read_stream(source, max_pixels)
    except (OSError, ValueError) as error:
        raise BadImage(f"the stream of a picture cannot be read: {reason(error)}") from None


def open_image(source: ImageSource, max_pixels: int = MAX_PIXELS, transparency: str = "drop") -> Image.Image:
    """The picture as a loaded Pillow image of mode RGB, upright: :func:`open_flat` without the share."""
    return open_flat(source, max_pixels, transparency)[0]


def open_flat(
    source: ImageSource, max_pixels: int = MAX_PIXELS, transparency: str = "drop"
) -> tuple[Image.Image, float]:
    """The picture as a loaded Pillow image of mode RGB, its orientation applied, and which part of its pixels (0 to 1)
    was not opaque.

    ``source`` is left as it is, but for a stream, which is read. ``transparency`` is one of
    :data:`~avl_edge.config.TRANSPARENCY`. Of values of 16 bits the high byte is taken.

    Raises BadInput for a string, and BadImage, naming the source, if it is missing, unreadable, damaged, animated, not
    JPEG, PNG, WebP or BMP, larger than ``max_pixels`` (at most MAX_PIXELS) or its share of MAX_BYTES, or longer than
    MAX_ASPECT_RATIO times its width (or the other way round), or would take a decoder too long.
    """
    taken = _taken(source, max_pixels)
    if isinstance(taken, Image.Image):
        image = _loaded(taken, picture_name(taken), max_pixels)
        flat, share = _converted(image, upright(*_metadata_of(image)), picture_name(taken), transparency)
        return (flat.copy() if flat is taken else flat), share
    name, content = picture_name(taken), _content(taken, max_pixels)
    with _opened(content, name, max_pixels) as (image, header):
        turn = orientation(content, image.format or "")
        loaded = _loaded(image, name, max_pixels)
        if not header.is_ended:
            _check_twin(content, loaded, name)
        return _converted(loaded, turn, name, transparency)


def _content(source: os.PathLike[str] | bytes, max_pixels: int) -> bytes:
    return source if isinstance(source, bytes) else _read(Path(source), _most_bytes(max_pixels))


def _most_bytes(max_pixels: int) -> int:
    return MAX_BYTES * max_pixels // MAX_PIXELS


def image_size(source: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in pixels of the picture that :func:`open_image` gives, without decoding one; raises as far as
    headers tell."""
    taken = _taken(source, max_pixels)
    if isinstance(taken, Image.Image):
        _check_size(taken.size, picture_name(taken), max_pixels)
        if taken.format == "PNG" and not _metadata_of(taken)[0]:
            _loaded(taken, picture_name(taken), max_pixels)  # Pillow meets what stands behind the pixels then
        return _turned_size(taken.size, upright(*_metadata_of(taken)))
    content = _content(taken, max_pixels)
    with _opened(content, picture_name(taken), max_pixels) as (image, _):
        return _turned_size(image.size, orientation(content, image.format or ""))


def _turned_size(size: tuple[int, int], turn: int) -> tuple[int, int]:
    return (size[1], size[0]) if turn in _SIDEWAYS else size


def _metadata_of(image: Image.Image) -> tuple[bytes, bytes]:
    """The EXIF and XMP data that came with a Pillow image."""
    exif, raw = image.info.get("exif", b""), image.info.get("Raw profile type exif")
    if not exif and isinstance(raw, str):
        with suppress(ValueError):
            exif = bytes.fromhex("".join(raw.split("\n")[3:]))
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    xmp = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
    return exif if isinstance(exif, bytes) else b"", xmp if isinstance(xmp, bytes) else b""


def picture_name(source: ImageSource) -> str:
    """What messages call a picture by: its file, in quotes, where it has one."""
    name = os.fspath(source) if isinstance(source, os.PathLike) else getattr(source, "filename", "")
    return f"'{name}'" if name else "the picture"


def _read(path: Path, most: int) -> bytes:
    name = os.fspath(path)
    try:
        if path.is_dir():
            raise BadImage(f"'{name}' is a directory: give the path of one picture in it")
        if path.exists() and not path.is_file():
            raise BadImage(f"'{name}' is not a regular file: save the picture to a file first")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > most:
                raise _too_many_bytes(f"'{name}'", most)
            return _read_bounded(file, f"'{name}'", most)
    except FileNotFoundError:
        raise BadImage(f"'{name}' does not exist: check the path of the picture") from None
    except PermissionError:
        raise BadImage(f"'{name}' cannot be read: check its permissions") from None
    except (OSError, ValueError) as error:
        raise BadImage(f"{name!r} cannot be opened: {reason(error)}") from None


def read_stream(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> bytes:
    """All of a stream that a picture comes from, such as standard input; BadImage for what :func:`open_image` refuses
    by its length."""
    return _read_bounded(file, "the picture", _most_bytes(max_pixels))


def _read_bounded(file: BinaryIO, name: str, most: int) -> bytes:
    content = read_bytes(file, most)
    if content is None:
        raise _too_many_bytes(name, most)
    return content


@contextmanager
def _opened(content: bytes, name: str, max_pixels: int) -> Iterator[tuple[Image.Image, Header]]:
    """The picture as Pillow opens it, not yet decoded and without metadata, once its headers are sound."""
    if len(content) > _most_bytes(max_pixels):
        raise _too_many_bytes(name, _most_bytes(max_pixels))
    kind = identify(content[:_HEAD_BYTES])
    if kind not in SUPPORTED:
        raise BadImage(_refusal(content, kind, name))
    header = read_header(content, kind)
    if header is None or 0 in (header.width, header.height):
        raise BadImage(f"{name} is damaged: its {kind} header is incomplete; save or download it again")
    _check_size((header.width, header.height), name, max_pixels)
    _check_cost(header, name)
    bare = without_metadata(content, kind)
    bare = bare if header.is_ended else variants(bare)[0]
    with _whatever_decoders_raise(name), Image.open(io.BytesIO(bare), formats=[kind]) as image:
        if header.frames > 1 or getattr(image, "is_animated", False):
            raise BadImage(f"{name} is animated, which is not supported: save one frame of it as a picture")
        if "transparency" in image.info and header.depth != 8:
            image.info["transparency"] = _key_of_eight_bits(image, header.depth)
        yield image, header


def _key_of_eight_bits(image: Image.Image, depth: int) -> Any:
    """A transparent colour as the pixels become that Pillow makes of values of ``depth`` bits."""
    key = image.info["transparency"]
    if isinstance(key, tuple):
        return tuple(each >> 8 for each in key)
    return key * 255 // (2**depth - 1) if image.mode == "L" and depth < 8 else key


def _check_twin(content: bytes, image: Image.Image, name: str) -> None:
    """A JPEG without an end is sound if its last rows do not depend on what follows them."""
    other = variants(without_metadata(content, "JPEG"))[1]
    sound = has_all_scans(content)
    if sound:
        with _whatever_decoders_raise(name), Image.open(io.BytesIO(other), formats=["JPEG"]) as twin:
            sound = ImageChops.difference(image, twin).getbbox() is None
    if not sound:
        raise BadImage(f"{name} is damaged and cannot be decoded (image file is truncated): save or download it again")


def _refusal(head: bytes, kind: str | None, name: str) -> str:
    if not head:
        return f"{name} is empty: save or download the picture again"
    if kind == "LFS":
        return f"{name} is a pointer of Git LFS in place of the picture: run 'git lfs pull' where it came from"
    if kind == "text":
        return f"{name} holds text, not a picture: {_USE}"
    if kind is None:
        return f"{name} is not a picture of a known format: {_USE}"
    return f"{name} cannot be used, {kind} is not supported: {_USE}{_CONVERTERS.get(kind, '')}"


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        bound = "" if max_pixels == MAX_PIXELS else ", for which the process has memory"
        raise BadImage(
            f"{name} is too large: {width} x {height} pixels, more than {max_pixels / 1e6:.3g} megapixels{bound}; "
            f"scale it down"
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise BadImage(
            f"{name} is too narrow: {width} x {height} pixels, an aspect ratio over {MAX_ASPECT_RATIO}:1; crop it"
        )


def _too_many_bytes(name: str, most: int) -> BadImage:
    return BadImage(f"{name} is too large: more than {format_size(most)}; save it as a JPEG")


def _check_cost(header: Header, name: str) -> None:
    """What a decoder would be busy with for long, though the picture is no larger than others."""
    scanned = header.width * header.height * header.scans
    if scanned > MAX_SCANNED_PIXELS:
        raise BadImage(
            f"{name} is a JPEG of {header.scans} scans over {header.width} x {header.height} pixels, which takes too "
            f"long to decode: save it as a baseline JPEG"
        )
    if header.parts > MOST_PARTS:
        raise BadImage(f"{name} is a file of more than {MOST_PARTS} parts: save it again")
    if header.run_lengths:
        raise BadImage(f"{name} is a BMP in run lengths, which is not supported: save it uncompressed")


def _loaded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """The size is checked here too: a header may differ from what its decoder found."""
    if 0 in image.size:
        raise BadImage(f"{name} has no pixels: {image.width} x {image.height}")
    _check_size(image.size, name, max_pixels)
    with _whatever_decoders_raise(name):
        image.load()
    return image


def _converted(image: Image.Image, turn: int, name: str, transparency: str) -> tuple[Image.Image, float]:
    """Upright and RGB, and the share of pixels that were not opaque."""
    with _whatever_decoders_raise(name):
        how = _TURNS.get(turn)
        return flattened(image if how is None else image.transpose(how), transparency)


def _whatever_decoders_raise(name: str) -> AbstractContextManager[None]:
    """Decoders raise whatever they like on damaged data."""
    return refusing(lambda why: BadImage(f"{name} is damaged and cannot be decoded ({why}): save or download it again"))
