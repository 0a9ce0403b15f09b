"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with a tower of RMS norms, gated MLPs and windows."""

from .published import PUBLISHED
from .spec import Qwen25VlSpec, read

__all__ = ["PUBLISHED", "Qwen25VlSpec", "read"]
