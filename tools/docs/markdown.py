"""Measurements read, and written as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT / "docs" / "measurements"


def measured(name: str) -> dict[str, Any]:
    """The document ``docs/measurements/NAME.json``: ``date`` and ``command`` beside what was measured."""
    document: dict[str, Any] = json.loads((MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1) -> str:
    """The first ``words`` columns to the left, the others, which are numbers, to the right."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, rule, *rows))


def percent(share: float, digits: int = 1) -> str:
    """Of a share from 0 to 1."""
    return f"{100 * share:.{digits}f}"


def source(name: str) -> str:
    """Where a table's figures come from, as a sentence below it."""
    document = measured(name)
    commands = document["command"] if isinstance(document["command"], list) else [document["command"]]
    listed = ", ".join(f"`{command}`" for command in commands)
    how = listed if len(commands) <= 2 else f"{len(commands)} commands, named in the file"
    where = document["machine"]["cpu"] if "machine" in document else f"NVRTC {document['nvrtc']}"
    return f"[{name}.json](measurements/{name}.json), {document['date']}, {where}: {how}."


def block(text: str, *names: str) -> str:
    """A table with its sources."""
    return "\n".join([text, "", *map(source, names)])
