"""Keep a figure with where it comes from: run a command and file its JSON with date, machine and versions.

    python -m tools.record docs/measurements/NAME.json -- python -m tools.demo_model.evaluate --json

The command's last output has to be one JSON document; it is written below ``command``, ``date``, ``machine`` and
``seconds`` (how long the command ran). Nothing is written when the command fails.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGES = ("avl-edge", "torch", "transformers", "tokenizers", "numpy", "pillow")


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def main(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    command: Annotated[list[str], typer.Argument(help="The command, after --.")],
) -> None:
    """Run ``command`` and keep its JSON."""
    start = time.monotonic()
    program = [sys.executable, *command[1:]] if command[0] == "python" else command
    run = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise typer.Exit(run.returncode)
    document = {
        "command": shlex.join(command),
        "date": date.today().isoformat(),
        "machine": machine(),
        "seconds": round(time.monotonic() - start),
        "result": json.loads(run.stdout),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
