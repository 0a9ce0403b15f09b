"""Processes that tests start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

from tests import ROOT


def hear_interrupts() -> None:
    """For ``preexec_fn``: a shell that runs the tests in its background lets all of them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_python(code: str, *options: str) -> str:
    """What a process of its own prints, an interpreter with ``options``."""
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
