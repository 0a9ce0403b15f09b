"""From pictures and text to what the model takes, and from token ids back to text. Needs no torch."""

from .detokenizer import Detokenizer
from .images import DECODING_BYTES_PER_PIXEL, MAX_PIXELS, ImageSource, check_sources, open_image, read_stream
from .processor import Processor

__all__ = [
    "DECODING_BYTES_PER_PIXEL",
    "MAX_PIXELS",
    "Detokenizer",
    "ImageSource",
    "Processor",
    "check_sources",
    "open_image",
    "read_stream",
]
