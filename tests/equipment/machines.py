"""Machines as trees of files: those that were recorded, and one of 8 GB that has so much memory to give."""

from __future__ import annotations

import shutil
from pathlib import Path

TREES = Path(__file__).parent / "trees"
NAMES = sorted(path.name for path in TREES.iterdir())
ORIN = TREES / "agx-orin-64-jp62"
GB = 10**9


def copy_of_orin(folder: Path) -> Path:
    """A copy of the AGX Orin's tree within ``folder``, to be changed."""
    return Path(shutil.copytree(ORIN, folder / "tree"))


def write(root: Path, available: int, stall: float = 0.0, total: int = 0) -> None:
    """``available`` bytes, ``stall`` percent of the last ten seconds waited for memory, ``total`` microseconds ever."""
    (root / "proc/pressure").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 8000000 kB\nMemFree: 0 kB\nMemAvailable: {available // 1024} kB\n")
    averages = f"avg10={stall:.2f} avg60=0.00 avg300=0.00 total={total}"
    (root / "proc/pressure/memory").write_text(f"some {averages}\nfull {averages}\n")
