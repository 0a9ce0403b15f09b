"""The command line as tests call it: a process of its own, or what a call within this one left behind."""

from __future__ import annotations

import sys
from dataclasses import dataclass

PROMPT = "What is shown?"
COMMAND = [sys.executable, "-c", "from avl_edge.cli import main; main()", "run"]


@dataclass(frozen=True)
class Outcome:
    """Exit code, standard output and standard error."""

    code: int
    out: str
    err: str
