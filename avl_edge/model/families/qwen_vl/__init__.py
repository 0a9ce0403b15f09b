"""Qwen-VL (arXiv 2308.12966): square pictures, ViT-bigG, a resampler to 256 tokens, and the first Qwen's decoder."""

from .published import PUBLISHED
from .spec import QwenVlSpec, read

__all__ = ["PUBLISHED", "QwenVlSpec", "read"]
