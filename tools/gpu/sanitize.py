"""NVIDIA's compute-sanitizer over a small part of the numerics, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from tools.gpu.dut import CheckFailed
from tools.gpu.report import Skipped

FOUND = 86
"""The exit status that the sanitizer gives when it has found something."""
TOOLS = ("memcheck", "racecheck")


def check_sanitizer(
    tool: str, program: Sequence[str] = (sys.executable, "-m", "tools.gpu.small"), limit: float = 1800
) -> dict[str, str]:
    """No access outside of an allocation, no race over shared memory; ``tool`` is one of :data:`TOOLS`."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise Skipped("compute-sanitizer is not in the PATH: it comes with the CUDA toolkit")
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *program]
    # Without torch's cache each tensor is an allocation, whose borders the sanitizer guards.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"{tool} did not end within {limit:.0f} s") from None
    lines = [line for line in run.stdout.splitlines() + run.stderr.splitlines() if line.strip()]
    if run.returncode:
        raise CheckFailed(f"{tool} ended with {run.returncode}: " + " | ".join(lines[-8:]))
    return {"summary": next((line for line in reversed(lines) if "SUMMARY" in line), "")}
