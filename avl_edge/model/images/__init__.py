"""From a picture's file to pixels: what is read, what a config asks of it, and what becomes of it. Needs no torch."""

from .frames import Frames, Moment, Shown, Source, check_shown
from .sources import (
    DECODING_BYTES_PER_PIXEL,
    MAX_PIXELS,
    ImageSource,
    check_sources,
    image_size,
    open_image,
    read_stream,
)

__all__ = [
    "DECODING_BYTES_PER_PIXEL",
    "MAX_PIXELS",
    "Frames",
    "ImageSource",
    "Moment",
    "Shown",
    "Source",
    "check_shown",
    "check_sources",
    "image_size",
    "open_image",
    "read_stream",
]
