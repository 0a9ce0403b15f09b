"""What stands in a picture's file beside its pixels: its orientation is read here, and the rest left out.

No decoder sees metadata: EXIF, XMP, colour profiles, thumbnails and text may be broken or large in any way, and the
picture is the same.
"""

from __future__ import annotations

import re
import struct
import zlib

from .headers import END_OF_IMAGE, START_OF_SCAN, chunks_of_png, chunks_of_webp, segments

_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION = 0x0112
# Of a whole number in a TIFF directory by its type: 8, 16 and 32 bits.
_WHOLE = {1: "B", 3: "H", 4: "I"}
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([0-9])")
_TEXT_BYTES = 1 << 20
_JFIF, _ADOBE, _COMMENT = 0xE0, 0xEE, 0xFE
# The fewest bytes of those segments that say how colours are stored: with less they are no use to a decoder.
_OF_COLOUR = {_JFIF: (b"JFIF\0", 14), _ADOBE: (b"Adobe", 12)}
_TRANSPARENT_COLOUR = b"tRNS"
_WEBP_PIXELS = frozenset((b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"))
_ALPHA_AND_ANIMATION = 0x12


def orientation(content: bytes, kind: str) -> int:
    """How the picture in a file is to be turned, 1 to 8, by EXIF, or else by XMP; 1 where it says nothing readable."""
    found = {"JPEG": _of_jpeg, "PNG": _of_png, "WEBP": _of_webp}.get(kind)
    exif, xmp = found(content) if found else (b"", b"")
    return upright(exif, xmp)


def upright(exif: bytes, xmp: bytes) -> int:
    """The same of the two blocks of metadata themselves."""
    told = _in_tiff(exif)
    if told is None and (match := _XMP_ORIENTATION.search(xmp)):
        told = int(match[1])
    return told if told is not None and 1 <= told <= 8 else 1


def without_metadata(content: bytes, kind: str) -> bytes:
    """The same picture in a file that has only what its pixels need; the same file where nothing else is in it."""
    without = {"JPEG": _pixels_of_jpeg, "PNG": _pixels_of_png, "WEBP": _pixels_of_webp}.get(kind)
    return without(content) if without else content


def _in_tiff(exif: bytes) -> int | None:
    """The orientation in the first directory of EXIF data; no other value is looked at."""
    data = exif.removeprefix(_EXIF).removeprefix(_EXIF)
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", data, at)
            if tag == _ORIENTATION and kind in _WHOLE and values == 1:
                (value,) = struct.unpack_from(order + _WHOLE[kind], data, at + 8)
                return int(value)
    except struct.error:
        pass  # cut off before it
    return None


def _of_jpeg(content: bytes) -> tuple[bytes, bytes]:
    exif, xmp = [], b""
    for marker, begin, end in segments(content):
        if marker == START_OF_SCAN:
            break
        if marker == 0xE1 and content.startswith(_EXIF, begin):
            exif.append(content[begin + len(_EXIF) : end])
        elif marker == 0xE1 and content.startswith(_XMP, begin):
            xmp = xmp or content[begin + len(_XMP) : end]
    return b"".join(exif), xmp


def _of_png(content: bytes) -> tuple[bytes, bytes]:
    exif = xmp = b""
    for name, begin, end in chunks_of_png(content):
        if name == b"eXIf":
            exif = content[begin:end]
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            key, _, body = content[begin : min(end, begin + _TEXT_BYTES)].partition(b"\0")
            if key == b"Raw profile type exif":
                exif = exif or _unhexed(_text_of_png(name, body))
            elif key == b"XML:com.adobe.xmp":
                xmp = _text_of_png(name, body)
    return exif, xmp


def _text_of_png(name: bytes, body: bytes) -> bytes:
    """Of a chunk of text, behind its key; at most :data:`_TEXT_BYTES`."""
    compressed = name == b"zTXt"
    if compressed:
        body = body[1:]
    elif name == b"iTXt":
        compressed, rest = body[:1] == b"\1", body[2:]
        body = rest.split(b"\0", 2)[-1]
    if not compressed:
        return body
    try:
        return zlib.decompressobj().decompress(body, _TEXT_BYTES)
    except zlib.error:
        return b""


def _unhexed(text: bytes) -> bytes:
    """ImageMagick's profile in a text: a name and a length, each on a line, and the bytes as hexadecimal digits."""
    try:
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    except ValueError:
        return b""


def _of_webp(content: bytes) -> tuple[bytes, bytes]:
    parts = {name: content[begin:end] for name, begin, end in chunks_of_webp(content) if name in (b"EXIF", b"XMP ")}
    return parts.get(b"EXIF", b""), parts.get(b"XMP ", b"")


def _pixels_of_jpeg(content: bytes) -> bytes:
    kept, scans = [b"\xff\xd8"], len(content)
    for marker, begin, end in segments(content):
        if marker == END_OF_IMAGE:
            return content  # without a scan it is no picture
        if marker == START_OF_SCAN:
            scans = begin - 4
            break
        if _is_of_pixels(content, marker, begin, end):
            kept.append(content[begin - 4 : end])
    if sum(map(len, kept)) == scans:
        return content
    return b"".join([*kept, content[scans:]])


def _is_of_pixels(content: bytes, marker: int, begin: int, end: int) -> bool:
    if marker in _OF_COLOUR:
        name, least = _OF_COLOUR[marker]
        return content.startswith(name, begin) and end - begin >= least
    return marker != _COMMENT and not _JFIF < marker <= 0xEF


def _pixels_of_png(content: bytes) -> bytes:
    """Chunks whose name begins with a small letter are not needed for the picture, but for one: the transparent
    colours."""
    kept, whole = [content[:8]], True
    for name, begin, end in chunks_of_png(content):
        if name[:1].isupper() or name == _TRANSPARENT_COLOUR:
            kept.append(content[begin - 8 : end + 4])
        else:
            whole = False
    return content if whole else b"".join(kept)


def _pixels_of_webp(content: bytes) -> bytes:
    names = list(chunks_of_webp(content))
    if all(name in _WEBP_PIXELS for name, *_ in names):
        return content
    body = b"".join(_webp_chunk(content, *each) for each in names if each[0] in _WEBP_PIXELS)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _webp_chunk(content: bytes, name: bytes, begin: int, end: int) -> bytes:
    chunk = content[begin - 8 : end + (end - begin) % 2]
    if name != b"VP8X" or end <= begin:
        return chunk
    return chunk[:8] + bytes([chunk[8] & _ALPHA_AND_ANIMATION]) + chunk[9:]
