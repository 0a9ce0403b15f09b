"""From pictures and text to what the model takes, and from token ids back to text. Needs no torch."""

from .detokenizer import Detokenizer
from .processor import Processor

__all__ = ["Detokenizer", "Processor"]
