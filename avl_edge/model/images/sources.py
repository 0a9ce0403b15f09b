"""From a path, bytes or a Pillow picture to an RGB picture, or to one sentence that says why not.

Pictures come from people and from the network, so what would cost memory or time is refused by the file's size and its
headers before a decoder runs, and only the decoder of the recognised format is ever tried. What was checked is what is
decoded: a file is read once, as it is at that moment.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

from PIL import Image

from ...config import format_size, read_bytes
from ...errors import BadImage, BadInput, reason, refusing
from .headers import MOST_PARTS, SUPPORTED, Header, exif_is_sound, identify, read_header

ImageSource: TypeAlias = os.PathLike[str] | bytes | Image.Image
"""A string is none: what comes from a client must not name a file by being passed on."""

MAX_BYTES = 256 * 2**20
"""Of a file: a BMP of :data:`MAX_PIXELS` with four bytes each."""
MAX_PIXELS = 64_000_000
DECODING_BYTES_PER_PIXEL = 24
"""Of the largest picture that is read: its file, and five copies of four bytes (Pillow holds RGB as four), which a
colour key makes; a turned JPEG makes three."""
MAX_ASPECT_RATIO = 100
MAX_SCANNED_PIXELS = 16 * MAX_PIXELS
"""Pixels times scans of a progressive JPEG, each of which costs 0.6 ns. A file of 12 MP may have 85; encoders write
10."""
MAX_METADATA_BYTES = 8 * 2**20
_ORIENTATION = 0x0112
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
_PNG_ORIENTATIONS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""What a PNG with an orientation has in it."""
_HEAD_BYTES = 64
_USE = "use JPEG, PNG, WebP or BMP"


def check_sources(images: Sequence[ImageSource]) -> None:
    """Raise BadInput for anything but a list of pictures, each a path, bytes or a Pillow image."""
    if isinstance(images, (str, bytes, os.PathLike)) or not isinstance(images, Sequence):
        raise BadInput("images must be a list of pictures: put a single one into brackets, as in [picture]")
    for image in images:
        _check_source(image)


def open_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as a loaded Pillow image of mode RGB, its EXIF orientation applied.

    ``source`` is a path, the bytes of a file, or a Pillow image (which is left as it is). Transparency is dropped,
    not blended; a colour key stays in ``info["transparency"]`` for `preprocess`.

    Raises BadInput for a string, and BadImage, naming the source, if it is missing, unreadable, damaged, animated, not
    JPEG, PNG, WebP or BMP, larger than ``max_pixels`` (at most MAX_PIXELS) or its share of MAX_BYTES, or longer than
    MAX_ASPECT_RATIO times its width (or the other way round), or would take a decoder too long.
    """
    _check_source(source)
    if isinstance(source, Image.Image):
        return _convert(source, _picture_name(source), max_pixels, in_place=False)
    if isinstance(source, bytes):
        return _decode(source, "the picture", max_pixels)
    return _decode(_read(Path(source), _most_bytes(max_pixels)), f"'{os.fspath(source)}'", max_pixels)


def _most_bytes(max_pixels: int) -> int:
    return MAX_BYTES * max_pixels // MAX_PIXELS


def image_size(source: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in pixels of the picture that :func:`open_image` gives, without decoding one; raises as far as
    headers tell."""
    _check_source(source)
    if isinstance(source, Image.Image):
        return _upright_size(source)
    name = "the picture" if isinstance(source, bytes) else f"'{os.fspath(source)}'"
    content = source if isinstance(source, bytes) else _read(Path(source), _most_bytes(max_pixels))
    with _opened(content, name, max_pixels) as image:
        # Pillow looks for the orientation of a PNG behind its pixels, which it decodes for that.
        if image.format == "PNG" and not any(each in content for each in _PNG_ORIENTATIONS):
            return image.size
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
    return (image.height, image.width) if turned else image.size


def _check_source(source: object) -> None:
    if isinstance(source, str):
        raise BadInput("a picture cannot be given as a string: for a file give pathlib.Path(...), or give its bytes")
    if not isinstance(source, bytes | os.PathLike | Image.Image):
        raise BadImage(f"a picture must be a pathlib.Path, bytes or a Pillow image, not {type(source).__name__}")


def _picture_name(image: Image.Image) -> str:
    filename = getattr(image, "filename", "")
    return f"'{filename}'" if filename else "the picture"


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


def _decode(content: bytes, name: str, max_pixels: int) -> Image.Image:
    with _opened(content, name, max_pixels) as image:
        return _convert(image, name, max_pixels, in_place=True)


@contextmanager
def _opened(content: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """The picture as Pillow opens it, not yet decoded, once its headers are sound."""
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
    with _whatever_decoders_raise(name), Image.open(io.BytesIO(content), formats=[kind]) as image:
        _check_single_frame(image, name)
        yield image


def _refusal(head: bytes, kind: str | None, name: str) -> str:
    if not head:
        return f"{name} is empty: save or download the picture again"
    if kind == "text":
        return f"{name} holds text, not a picture: {_USE}"
    if kind is None:
        return f"{name} is not a picture of a known format: {_USE}"
    return f"{name} cannot be used, {kind} is not supported: {_USE}"


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
    if header.metadata > MAX_METADATA_BYTES:
        raise BadImage(
            f"{name} has {format_size(header.metadata)} of metadata, more than {format_size(MAX_METADATA_BYTES)}: save "
            f"it without"
        )
    if header.run_lengths:
        raise BadImage(f"{name} is a BMP in run lengths, which is not supported: save it uncompressed")
    _check_exif(header.exif, name)


def _check_exif(exif: bytes, name: str) -> None:
    if not exif_is_sound(exif):
        raise BadImage(f"{name} is damaged: its EXIF data is larger than the file; save it without")


def _check_single_frame(image: Image.Image, name: str) -> None:
    # A JPEG of several frames is a camera's MPO: a still with its preview or second eye, and the first frame counts.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise BadImage(f"{name} is animated, which is not supported: save one frame of it as a picture")


def _convert(image: Image.Image, name: str, max_pixels: int, *, in_place: bool) -> Image.Image:
    """Loaded, upright and RGB; unless ``in_place`` a picture of its own.

    The size is checked here too: a header may differ from what its decoder found.
    """
    if 0 in image.size:
        raise BadImage(f"{name} has no pixels: {image.width} x {image.height}")
    _check_size(image.size, name, max_pixels)
    with _whatever_decoders_raise(name):
        image.load()
        _check_exif(_exif_of(image), name)
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
        if turn is not None:
            image = image.transpose(turn)
        elif not in_place:
            image = image.copy()
        if isinstance(image.info.get("transparency"), bytes):
            # One opacity per palette entry has no meaning in RGB; without it Pillow converts without a warning.
            del image.info["transparency"]
        return image if image.mode == "RGB" else image.convert("RGB")


def _exif_of(image: Image.Image) -> bytes:
    """The EXIF data that :meth:`Image.getexif` would read of what came with the file."""
    raw = image.info.get("Raw profile type exif")
    if "exif" not in image.info and isinstance(raw, str):
        return bytes.fromhex("".join(raw.split("\n")[3:]))
    exif = image.info.get("exif", b"")
    return exif if isinstance(exif, bytes) else b""


def _whatever_decoders_raise(name: str) -> AbstractContextManager[None]:
    """Decoders raise whatever they like on damaged data."""
    return refusing(lambda why: BadImage(f"{name} is damaged and cannot be decoded ({why}): save or download it again"))
