"""From a picture's file to pixels: what is read, what a config asks of it, and what becomes of it. Needs no torch."""

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
    "ImageSource",
    "check_sources",
    "image_size",
    "open_image",
    "read_stream",
]
