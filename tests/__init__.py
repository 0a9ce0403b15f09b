"""The tests, a folder for each wing of the package, and in `equipment` what they share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""
