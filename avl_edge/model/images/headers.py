"""What a picture file says about itself, read without any decoder.

Sizes and the number of parts are known before a decoder allocates a single pixel, so a small file can ask neither for a
huge canvas nor for a thousand passes over one.
"""

from __future__ import annotations

import re
import struct
from codecs import getincrementaldecoder
from collections.abc import Iterator
from dataclasses import dataclass

from ...files import LFS_POINTER

SUPPORTED = ("JPEG", "PNG", "WEBP", "BMP")

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"8BPS", "PSD"),
    (b"%PDF", "PDF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (LFS_POINTER, "LFS"),
)
# A container of this form (ISO/IEC 14496-12) says what is in it by its own brand, and by others that it is compatible
# with: an AVIF may call itself a picture in general (mif1).
_BRANDS = (
    (frozenset((b"avif", b"avis", b"MA1A", b"MA1B")), "AVIF"),
    (frozenset((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs")), "HEIC"),
    (frozenset((b"mif1", b"msf1", b"mif2", b"miaf")), "HEIF"),
    (frozenset((b"crx ",)), "a camera's raw CR3"),
    (frozenset((b"qt  ",)), "QuickTime video"),
)

# Start-of-frame markers: C0..CF without DHT (C4), JPG (C8) and DAC (CC).
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, 0xD8})
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
# Of these no segment begins: stuffed zeros and restarts (D0..D7), which belong to the data of a scan.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_RUN_LENGTHS = (1, 2)  # RLE8 and RLE4

MOST_PARTS = 1 << 16
"""Segments or chunks of a file. Encoders write 64 MP in half as many; no more are walked through."""


@dataclass(frozen=True)
class Header:
    """``width`` and ``height`` in pixels, as declared. ``scans``: how often a decoder passes over all of them.

    ``parts``: the segments or chunks that a reader walks through; ``frames``: those of an animated PNG; ``depth``: the
    bits of a value of a PNG; ``is_ended``: a JPEG has its mark of the end; ``run_lengths``: a BMP in run lengths, which
    Pillow decodes byte by byte in Python.
    """

    width: int
    height: int
    scans: int = 1
    parts: int = 1
    frames: int = 1
    depth: int = 8
    is_ended: bool = True
    run_lengths: bool = False


def identify(head: bytes) -> str | None:
    """The name of the format that the first bytes (32 are enough) belong to; "text" for text; None if unknown."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if _is_text(head):
        return "text"
    # Two letters are a weak sign, and a BMP header is never text.
    return "BMP" if head.startswith(b"BM") else None


def _of_brands(head: bytes) -> str:
    end = min(int.from_bytes(head[:4], "big"), len(head))
    own, compatible = head[8:12], {head[at : at + 4] for at in range(16, end, 4)}
    for brands in ({own}, compatible):
        names = [name for known, name in _BRANDS if known & brands]
        if names and names != ["HEIF"]:
            return names[0]
    return "HEIF" if own in _BRANDS[2][0] else "MP4 video"


def _is_text(head: bytes) -> bool:
    try:
        text = getincrementaldecoder("utf-8")().decode(head)  # incremental: the cut may split a character
    except UnicodeDecodeError:
        return False
    return bool(text) and all(character.isprintable() or character.isspace() for character in text)


def read_header(content: bytes, kind: str) -> Header | None:
    """What the file of a SUPPORTED kind declares; None if it is damaged, or no decoder should see it.

    All segments of a JPEG are walked, and all chunks of a PNG.
    """
    try:
        return {"PNG": _png, "BMP": _bmp, "WEBP": _webp, "JPEG": _jpeg}[kind](content)
    except (struct.error, IndexError):
        return None


def chunks_of_png(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The name of each chunk of a PNG, and where its content begins and ends; the last may end beyond the file."""
    at = 8
    for _ in range(MOST_PARTS + 1):
        if at + 8 > len(content):
            return
        (length,) = struct.unpack_from(">I", content, at)
        yield content[at + 4 : at + 8], at + 8, at + 8 + length
        at += 12 + length


def chunks_of_webp(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The same of a WebP."""
    at = 12
    for _ in range(MOST_PARTS + 1):
        if at + 8 > len(content):
            return
        (length,) = struct.unpack_from("<I", content, at + 4)
        yield content[at : at + 4], at + 8, at + 8 + length
        at += 8 + length + length % 2


def _png(content: bytes) -> Header | None:
    if content[12:16] != b"IHDR":
        return None
    width, height, depth = struct.unpack_from(">IIB", content, 16)
    parts, frames, pixels = 0, 1, False
    for name, begin, _ in chunks_of_png(content):
        parts += 1
        pixels |= name == b"IDAT"
        if name == b"acTL" and not pixels:
            (frames,) = struct.unpack_from(">I", content, begin)
    return Header(width, height, parts=parts, frames=frames, depth=depth)


def _bmp(content: bytes) -> Header | None:
    (size,) = struct.unpack_from("<I", content, 14)
    if size == 12:  # the OS/2 header has 16-bit sizes
        return Header(*struct.unpack_from("<HH", content, 18))
    width, height, compression = struct.unpack_from("<ii4xI", content, 18)
    # A negative height means rows from top to bottom.
    return Header(abs(width), abs(height), run_lengths=compression in _RUN_LENGTHS)


def _webp(content: bytes) -> Header | None:
    chunk = content[12:16]
    if chunk == b"VP8X":
        width, height = (1 + int.from_bytes(content[at : at + 3], "little") for at in (24, 27))
        return Header(width, height) if len(content) >= 30 else None
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return Header(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return Header(width & 0x3FFF, height & 0x3FFF)
    return None


def _jpeg(content: bytes) -> Header | None:
    size: tuple[int, int] | None = None
    parts, scans, is_ended = 0, 0, False
    for marker, begin, _ in segments(content):
        parts += 1
        if marker in START_OF_FRAME and size is None:
            height, width = struct.unpack_from(">xHH", content, begin)
            size = width, height
        scans += marker == START_OF_SCAN
        is_ended |= marker == END_OF_IMAGE
    return Header(*size, scans, parts, is_ended=is_ended) if size else None


def segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """The code of each marker with a segment of a JPEG, and where its content begins and ends, up to the end of the
    image, which is the last. What lies between segments is skipped, as decoders do."""
    at = 2
    for _ in range(MOST_PARTS + 1):
        found = _MARKER.search(content, at)
        if found is None:
            return
        at, marker = found.end(), found[1][0]
        if marker == END_OF_IMAGE:
            yield marker, at, at
            return
        if marker not in _WITHOUT_LENGTH:
            if at + 2 > len(content):
                return
            length = max(int(struct.unpack_from(">H", content, at)[0]), 2)
            yield marker, at + 2, at + length
            at += length
