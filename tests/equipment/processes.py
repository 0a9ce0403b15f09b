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


PEAK_MEMORY = """
def peak_memory() -> int:
    \"\"\"The most that this process held, in kB. (What getrusage says begins with what its parent held.)\"\"\"
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
"""
"""For the head of a program that measures itself."""


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
