"""The checkpoint that comes with the package: a small LLaVA that reads drawn pictures."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).parents[1] / "demo"
