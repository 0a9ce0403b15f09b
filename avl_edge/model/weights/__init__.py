"""The matrices of linear layers in their stored formats, and the readers of those formats."""

from __future__ import annotations

from .linear import Dense, Grouped, LinearWeight

__all__ = ["Dense", "Grouped", "LinearWeight"]
