"""Packages without engines: files that take their place, published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from avl_edge.package.engine import Fingerprint, Platform, open_package

ORIN = Platform("10.3.0", "12.6", "sm_87", "36.4.3", "c" * 64)
SHAPES = {"images": 4, "prompt_tokens": 3072, "sequences": 16}
FINGERPRINT = Fingerprint("a" * 64, "b" * 64, "float16", 2, SHAPES, ORIN)


def fill(text: str = "engine", fingerprint: Fingerprint = FINGERPRINT) -> Callable[[Path], Fingerprint]:
    """Writes two files that take the place of engines."""

    def write(staging: Path) -> Fingerprint:
        (staging / "vision.engine").write_bytes(b"\0" * 5000 + text.encode())
        (staging / "decoder.engine").write_text(text)
        return fingerprint

    return write


def contents(out: Path) -> str:
    """What a reader gets."""
    with open_package(out, FINGERPRINT) as package:
        return package["decoder.engine"].read_text()


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}
