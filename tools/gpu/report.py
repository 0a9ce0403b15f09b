"""Checks run one after the other, each to its verdict, and the JSON that keeps them."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("avl-edge", "torch", "numpy", "cuda-python", "tensorrt")


class Skipped(Exception):
    """Why a check cannot be made here."""


@dataclass(frozen=True)
class Outcome:
    """What came of a check: "ok", "failed" or "skipped", why where it is not ok, what was found, and seconds."""

    name: str
    verdict: str
    reason: str = ""
    found: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


Check = tuple[str, Callable[[], Mapping[str, Any]]]
"""A name, and what returns its findings; it raises :class:`Skipped`, or anything else where something is wrong."""


def run(checks: Sequence[Check]) -> list[Outcome]:
    """Every check, whatever became of those before it, with a line for each on stderr."""
    outcomes = []
    for name, check in checks:
        start = time.monotonic()
        verdict, reason, found = _attempt(check)
        outcome = Outcome(name, verdict, reason, found, round(time.monotonic() - start, 2))
        print(f"{verdict:7} {name}" + (f": {reason}" if reason else ""), file=sys.stderr)
        outcomes.append(outcome)
    return outcomes


def _attempt(check: Callable[[], Mapping[str, Any]]) -> tuple[str, str, Mapping[str, Any]]:
    try:
        return "ok", "", check()
    except Skipped as reason:
        return "skipped", str(reason), {}
    except Exception as error:  # a check that breaks has failed, and the others still run
        return "failed", f"{type(error).__name__}: {error}", {}


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 where a check failed."""
    return int(any(outcome.verdict == "failed" for outcome in outcomes))


def machine(gpu: Mapping[str, Any]) -> dict[str, Any]:
    """Processor and versions, and what is known of the GPU; None for what is not installed."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        **gpu,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(path: Path, command: str, on: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """One JSON document: what was run, when, where, and all that came of it."""
    document = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": dict(on),
        "seconds": round(sum(outcome.seconds for outcome in outcomes)),
        "checks": [asdict(outcome) for outcome in outcomes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".part")
    staged.write_text(json.dumps(document, indent=1) + "\n")
    staged.replace(path)
