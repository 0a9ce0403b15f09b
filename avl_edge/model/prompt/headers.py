"""What a picture file says about itself in its first bytes, read without any decoder.

Sizes are known before a decoder allocates a single pixel, so a small file cannot ask for a huge canvas.
"""

from __future__ import annotations

import struct
from codecs import getincrementaldecoder
from typing import BinaryIO

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
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x01}
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


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


def declared_size(file: BinaryIO, kind: str) -> tuple[int, int] | None:
    """Width and height in pixels as the header of a SUPPORTED kind declares them; None if the header is damaged.

    The file's position is moved. For JPEG the segments before the first scan are walked, whatever their length.
    """
    file.seek(0)
    try:
        return {"PNG": _png_size, "BMP": _bmp_size, "WEBP": _webp_size, "JPEG": _jpeg_size}[kind](file)
    except (struct.error, IndexError):
        return None


def _png_size(file: BinaryIO) -> tuple[int, int] | None:
    head = file.read(24)
    if head[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def _bmp_size(file: BinaryIO) -> tuple[int, int]:
    head = file.read(26)
    if struct.unpack("<I", head[14:18])[0] == 12:  # the OS/2 header has 16-bit sizes
        width, height = struct.unpack("<HH", head[18:22])
    else:
        width, height = struct.unpack("<ii", head[18:26])
    return abs(width), abs(height)  # a negative height means rows from top to bottom


def _webp_size(file: BinaryIO) -> tuple[int, int] | None:
    head = file.read(30)
    chunk = head[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if chunk == b"VP8L":
        bits = struct.unpack("<I", head[21:25])[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _jpeg_size(file: BinaryIO) -> tuple[int, int] | None:
    file.seek(2)
    while True:
        marker = _next_marker(file)
        if marker in (None, _START_OF_SCAN, _END_OF_IMAGE):
            return None
        if marker in _WITHOUT_LENGTH:
            continue
        length = struct.unpack(">H", file.read(2))[0]
        if marker in _START_OF_FRAME:
            height, width = struct.unpack(">xHH", file.read(5))
            return width, height
        file.seek(max(length - 2, 0), 1)


def _next_marker(file: BinaryIO) -> int | None:
    """The next marker's code; bytes before it that are no marker are skipped, as decoders do."""
    byte = file.read(1)
    while byte:
        if byte == b"\xff":
            while byte == b"\xff":
                byte = file.read(1)
            if byte and byte != b"\0":
                return byte[0]
        byte = file.read(1)
    return None
