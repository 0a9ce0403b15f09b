"""Qwen2-VL (arXiv 2409.12191): pictures keep their shape, four patches are one token, positions have three axes."""

from .published import PUBLISHED
from .spec import Qwen2VlSpec, read

__all__ = ["PUBLISHED", "Qwen2VlSpec", "read"]
