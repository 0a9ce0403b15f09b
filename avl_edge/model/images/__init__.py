"""From a picture's file to pixels: what is read, what a config asks of it, and what becomes of it. Needs no torch."""

from .inputs import Frame, ImageSource, TakenSource
from .sources import DECODING_BYTES_PER_PIXEL, MAX_PIXELS, open_image, read_stream, take_sources

__all__ = [
    "DECODING_BYTES_PER_PIXEL",
    "MAX_PIXELS",
    "Frame",
    "ImageSource",
    "TakenSource",
    "open_image",
    "read_stream",
    "take_sources",
]
