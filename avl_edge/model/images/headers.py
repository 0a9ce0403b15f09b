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
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}

# Start-of-frame markers: C0..CF without DHT (C4), JPG (C8) and DAC (CC).
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, 0xD8})
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
# Of these no segment begins: stuffed zeros and restarts (D0..D7), which belong to the data of a scan.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_EXIF = b"Exif\0\0"
_RUN_LENGTHS = (1, 2)  # RLE8 and RLE4
# Bytes of a value by its type in a TIFF directory.
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}

MOST_PARTS = 1 << 16
"""Segments or chunks of a file. Encoders write 64 MP in half as many; no more are walked through."""


@dataclass(frozen=True)
class Header:
    """``width`` and ``height`` in pixels, as declared. ``scans``: how often a decoder passes over all of them.

    ``parts``: the segments or chunks that a reader walks through; ``metadata``: bytes before the first pixel's;
    ``exif``: a JPEG's EXIF data, which Pillow reads when it opens the file; ``run_lengths``: a BMP in run lengths,
    which Pillow decodes byte by byte in Python.
    """

    width: int
    height: int
    scans: int = 1
    parts: int = 1
    metadata: int = 0
    exif: bytes = b""
    run_lengths: bool = False


def identify(head: bytes) -> str | None:
    """The name of the format that the first bytes (32 are enough) belong to; "text" for text; None if unknown."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "MP4")
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if _is_text(head):
        return "text"
    # Two letters are a weak sign, and a BMP header is never text.
    return "BMP" if head.startswith(b"BM") else None


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


def exif_is_sound(exif: bytes) -> bool:
    """Whether the values of the first directory take no more bytes than there are in all.

    Pillow copies each of them, whichever is asked for. Where they overlap, 64 kB of EXIF data would take 350 MB.
    """
    data = exif.removeprefix(_EXIF).removeprefix(_EXIF)
    order, taken = "<" if data.startswith(b"II") else ">", 0
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            kind, values = struct.unpack_from(f"{order}2xHI", data, at)
            taken += values * _TIFF_SIZES.get(kind, 0)
    except struct.error:
        pass  # cut off; what stands before counts
    return taken <= len(data)


def _png(content: bytes) -> Header | None:
    if content[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", content, 16)
    parts, at, pixels = 0, 8, len(content)
    while at + 8 <= len(content) and parts <= MOST_PARTS:
        (length,) = struct.unpack_from(">I", content, at)
        if content[at + 4 : at + 8] == b"IDAT":
            pixels = min(pixels, at)
        at += 12 + length
        parts += 1
    return Header(width, height, parts=parts, metadata=pixels)


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
    parts, scans, metadata, exif = 0, 0, len(content), []
    for marker, at in _segments(content):
        parts += 1
        if marker in _START_OF_FRAME and size is None:
            height, width = struct.unpack_from(">xHH", content, at)
            size = width, height
        elif marker == _START_OF_SCAN:
            scans += 1
            metadata = min(metadata, at)
        elif marker == _APP1 and content.startswith(_EXIF, at) and not scans:
            exif.append(content[at + len(_EXIF) : at + _length(content, at) - 2])
    return Header(*size, scans, parts, metadata, b"".join(exif)) if size else None


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """The code of each marker with a segment, and where its content begins, up to the end of the image. What lies
    between segments is skipped, as decoders do."""
    at = 2
    for _ in range(MOST_PARTS + 1):
        found = _MARKER.search(content, at)
        if found is None or found[1][0] == _END_OF_IMAGE:
            return
        at = found.end()
        if found[1][0] not in _WITHOUT_LENGTH:
            if at + 2 > len(content):
                return
            yield found[1][0], at + 2
            at += max(_length(content, at + 2), 2)


def _length(content: bytes, at: int) -> int:
    """Bytes of the segment whose content begins at ``at``, its two of the length included."""
    length: int = struct.unpack_from(">H", content, at - 2)[0]
    return length
