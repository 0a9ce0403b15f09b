"""Numbers out of text that may be anything: a value within its plausible range, or None."""

from __future__ import annotations

import re

# Bounded lengths: Python refuses to convert thousands of digits, and no real figure has them.
_INTEGER = re.compile(r"[-+]?[0-9]{1,20}")
_DECIMAL = re.compile(r"[-+]?[0-9]{1,20}(?:\.[0-9]{1,12})?")

MAX_BYTES = 1 << 60
"""Above this a byte count is not a size: kernels write "no limit" as a number near 2^63."""

MAX_CPUS = 8192


def integer(text: str | None, low: int, high: int) -> int | None:
    """The integer that ``text`` is (surrounding blanks and NULs aside) if it lies in [low, high], else None."""
    stripped = (text or "").strip(" \t\r\n\0")
    if not _INTEGER.fullmatch(stripped):
        return None
    value = int(stripped)
    return value if low <= value <= high else None


def decimal(text: str | None, low: float, high: float) -> float | None:
    """Like :func:`integer`, for a decimal number."""
    stripped = (text or "").strip(" \t\r\n\0")
    if not _DECIMAL.fullmatch(stripped):
        return None
    value = float(stripped)
    return value if low <= value <= high else None


def hertz(text: str | None) -> int | None:
    """A clock in Hz, from 1 MHz to 20 GHz."""
    return integer(text, 10**6, 20 * 10**9)


def hertz_of_khz(text: str | None) -> int | None:
    """A clock that the kernel writes in kHz, in Hz."""
    value = integer(text, 10**3, 20 * 10**6)
    return None if value is None else value * 1000


def celsius(text: str | None) -> float | None:
    """A temperature in degrees Celsius; None outside -40 to 150, such as the -256 of a sensor without power."""
    return decimal(text, -40.0, 150.0)


def is_constant(zone: str) -> bool:
    """Whether a thermal zone tells a number that never changes: the power chip's (``PMIC``, ``PMIC-Die``) is 50 or
    100."""
    return zone.lower().startswith("pmic")


def celsius_of_milli(text: str | None) -> float | None:
    """A temperature that the kernel writes in thousandths of a degree, in degrees Celsius."""
    value = integer(text, -40_000, 150_000)
    return None if value is None else value / 1000


def bytes_of_kib(text: str | None) -> int | None:
    """A size that the kernel writes in kB (1024 bytes), in bytes."""
    value = integer(text, 0, MAX_BYTES >> 10)
    return None if value is None else value << 10


def line_of(text: str) -> str | None:
    """The first line with something on it, printable and of a sane length."""
    for line in text.replace("\0", "\n").splitlines():
        stripped = line.strip()
        if stripped:
            return stripped if stripped.isprintable() and len(stripped) <= 200 else None
    return None
