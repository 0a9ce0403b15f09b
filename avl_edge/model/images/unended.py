"""JPEGs without the mark of their end, as cheap cameras send them: sound where nothing else is missing.

A decoder that runs out of data fills up what is missing, so it is given two different things to run into: where all
data is there, it reads neither, and the pictures are equal.
"""

from __future__ import annotations

import itertools
import re
import struct

from .headers import START_OF_FRAME, START_OF_SCAN, segments

_END = b"\xff\xd9"
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_NOISE = bytes.fromhex("9d5a36c1e78b2f4460d3") * 32
_MOST_SCANS = 1000
_COEFFICIENTS = 64


def variants(content: bytes) -> tuple[bytes, bytes]:
    """The file with its end, and with noise before its end, in which restarts come as a decoder expects them."""
    data = _trimmed(content)
    restarts = _RESTART.findall(data, data.rfind(b"\xff\xda"))
    latest = restarts[-1][0] if restarts else 0xD7
    following = (bytes([0xFF, 0xD0 + (latest - 0xD0 + count) % 8]) for count in range(1, 9))
    noise = _NOISE + b"".join(marker + _NOISE for marker in following)
    return data + _END, data + noise + _END


def _trimmed(content: bytes) -> bytes:
    """Without what cannot be data of a scan: half a mark, and zeros that a buffer was filled up with."""
    data = content.rstrip(b"\0")
    if data.endswith(b"\xff"):  # in a scan a value of 255 is written with a zero behind it
        return data + b"\0" if len(data) < len(content) else data[:-1]
    return data


def has_all_scans(content: bytes) -> bool:
    """Whether the scans, if they are whole, say every bit of every coefficient of every component."""
    lowest: dict[int, list[int]] = {}
    scans = 0
    try:
        for marker, begin, _ in segments(content):
            if marker in START_OF_FRAME:
                count = content[begin + 5]
                lowest = {content[begin + 6 + 3 * i]: [_COEFFICIENTS] * _COEFFICIENTS for i in range(count)}
            elif marker == START_OF_SCAN and (scans := scans + 1) <= _MOST_SCANS:
                count = content[begin]
                first, last, bits = struct.unpack_from("BBB", content, begin + 1 + 2 * count)
                for component in content[begin + 1 : begin + 1 + 2 * count : 2]:
                    lowest[component][first : last + 1] = [bits & 15] * (last + 1 - first)
    except (IndexError, KeyError, struct.error):
        return False
    return bool(lowest) and not any(itertools.chain.from_iterable(lowest.values()))
