"""From an RGB picture to the vision tower's input, as the CLIP, LLaVA and SigLIP image processors define it.

The order is: pad to a square, resize, crop the centre, rescale, normalise. The arithmetic follows the Pillow-based
processors of transformers bit for bit: 8-bit resizing by Pillow, rescaling in float64, normalising in float32.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...errors import BadImage
from ...request import PixelValues
from .config import ImageProcessorConfig
from .sources import MAX_PIXELS

_RESIZED = 2
"""On the way to its new size a picture may have so many times the pixels that it may have before."""
_BAND_PIXELS = 1 << 20


def preprocess(
    image: Image.Image, config: ImageProcessorConfig, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.float32]:
    """float32 ``[3, height, width]``, contiguous, of an RGB picture; ``config.output_size`` if fixed.
    BadImage where there would be more than twice ``max_pixels`` on the way."""
    _check_size(image.size, config, max_pixels)
    if config.resize is not None:
        image = _resize(image, config.resize, config)
    pixels = np.asarray(image)
    if config.crop is not None:
        pixels = _crop_centre(pixels, config.crop)
    table = _value_table(config)
    return np.stack([table[channel][pixels[..., channel]] for channel in range(3)])


def digest(pixels: PixelValues) -> str:
    """SHA-256, in hex, of a picture's pixels (little endian, row by row) and of their shape: pictures of one colour may
    differ in nothing else."""
    found = hashlib.sha256(repr((pixels.values.shape, pixels.picture)).encode())
    found.update(np.ascontiguousarray(pixels.values, dtype="<f4").tobytes())
    return found.hexdigest()


def _check_size(size: tuple[int, int], config: ImageProcessorConfig, max_pixels: int) -> None:
    """A few pixels of a long and narrow picture become many by padding, or by resizing its shortest edge."""
    if config.resize is None:
        return
    side = max(size)
    width, height = _target_size((side, side) if config.pad_to_square else size, config.resize)
    # Padded, the picture's own rows are resized at the square's width, then all rows at the target's.
    worked_on = side * max(size[1], width) if config.pad_to_square else width * height
    if worked_on > _RESIZED * max_pixels:
        becomes = f"pads it to {side} x {side}" if config.pad_to_square else f"makes it {width} x {height}"
        raise BadImage(
            f"the picture is too narrow for this model, which {becomes}: it has {size[0]} x {size[1]} pixels; crop it "
            f"or scale it down"
        )


def _resize(image: Image.Image, size: int | tuple[int, int], config: ImageProcessorConfig) -> Image.Image:
    """Resized to ``size``; where ``config`` pads, in the middle of a square of the mean colour.

    Pillow resizes along rows, then along columns, and rounds in between. So the square's rows can come in bands, and no
    more than a band of it ever exists; the bytes are the same.
    """
    if not config.pad_to_square or image.width == image.height:
        return image.resize(_target_size(image.size, size), config.resample)
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    red, green, blue = (int(value * 255) for value in config.mean or (0.0, 0.0, 0.0))
    width, height = _target_size((side, side), size)
    narrow = Image.new("RGB", (width, side), (red, green, blue))
    step = max(1, _BAND_PIXELS // side)
    for begin in range(top, top + image.height, step):
        end = min(begin + step, top + image.height)
        band = Image.new("RGB", (side, end - begin), (red, green, blue))
        band.paste(image.crop((0, begin - top, image.width, end - top)), (left, 0))
        narrow.paste(band.resize((width, end - begin), config.resample), (0, begin))
    return narrow.resize((width, height), config.resample)


def _target_size(size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height) after resizing; a single number is the shortest edge, and the other edge is rounded down."""
    if isinstance(resize, tuple):
        return resize[1], resize[0]
    width, height = size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def _crop_centre(pixels: npt.NDArray[np.uint8], crop: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """uint8 ``[crop height, crop width, 3]``; an edge shorter than the crop is filled up with black."""
    (source_rows, rows), (source_columns, columns) = (_centre(n, c) for n, c in zip(pixels.shape, crop, strict=False))
    cropped = np.zeros((*crop, 3), dtype=np.uint8)
    cropped[rows, columns] = pixels[source_rows, source_columns]
    return cropped


def _centre(length: int, crop: int) -> tuple[slice, slice]:
    """Which part of an edge is taken, and where it goes in the crop. An odd pixel more is lost or added before."""
    if length >= crop:
        start = (length - crop) // 2
        return slice(start, start + crop), slice(0, crop)
    start = (crop - length + 1) // 2
    return slice(0, length), slice(start, start + length)


def _value_table(config: ImageProcessorConfig) -> npt.NDArray[np.float32]:
    """float32 ``[3, 256]``: what each 8-bit value of each channel becomes; exact, and cheap."""
    values = np.arange(256, dtype=np.float32)
    if config.rescale_factor is not None:
        values = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    table = np.tile(values, (3, 1))
    if config.mean is not None and config.std is not None:
        mean, std = np.array(config.mean, dtype=np.float32), np.array(config.std, dtype=np.float32)
        table = (table - mean[:, None]) / std[:, None]
    return table
