"""LLaVA-1.6 (LLaVA-NeXT): LLaVA-1.5 that sees a picture as a square overview and as tiles of its full size."""

from .published import PUBLISHED
from .spec import LlavaNextSpec, read

__all__ = ["PUBLISHED", "LlavaNextSpec", "read"]
