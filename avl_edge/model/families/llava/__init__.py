"""LLaVA-1.5 (arXiv 2310.03744): square pictures, CLIP, a projector of two layers, a decoder of the LLaMA family."""

from .published import PUBLISHED
from .spec import LlavaSpec, read

__all__ = ["PUBLISHED", "LlavaSpec", "read"]
