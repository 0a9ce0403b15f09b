"""The matrices of linear layers in their stored formats, and the readers of those formats."""

from __future__ import annotations

from .config import quant_format
from .linear import Dense, Grouped, LinearWeight
from .rounding import pack
from .stored import QuantFormat, StoredLayer

__all__ = ["Dense", "Grouped", "LinearWeight", "QuantFormat", "StoredLayer", "pack", "quant_format"]
