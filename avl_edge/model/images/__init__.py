"""From a picture's file to pixels: what is read, what a config asks of it, and what becomes of it. Needs no torch."""

from .frames import Frames, Moment, Shown, Source, check_shown
from .inputs import Frame, ImageSource, TakenSource
from .sources import (
    DECODING_BYTES_PER_PIXEL,
    MAX_PIXELS,
    check_sources,
    image_size,
    open_image,
    read_stream,
    take_sources,
)

__all__ = [
    "DECODING_BYTES_PER_PIXEL",
    "MAX_PIXELS",
    "Frame",
    "Frames",
    "ImageSource",
    "Moment",
    "Shown",
    "Source",
    "TakenSource",
    "check_shown",
    "check_sources",
    "image_size",
    "open_image",
    "read_stream",
    "take_sources",
]
