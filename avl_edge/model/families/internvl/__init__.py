"""InternVL3 and InternVL3.5 in transformers' layout (-HF): tiles and a thumbnail, a pixel shuffle, a Qwen or LLaMA
decoder."""

from .published import PUBLISHED
from .spec import InternVlSpec, read

__all__ = ["PUBLISHED", "InternVlSpec", "read"]
