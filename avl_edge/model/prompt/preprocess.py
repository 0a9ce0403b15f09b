"""From an RGB picture to the vision tower's input, as the CLIP, LLaVA and SigLIP image processors define it.

The order is: pad to a square, resize, crop the centre, rescale, normalise. The arithmetic follows the Pillow-based
processors of transformers bit for bit: 8-bit resizing by Pillow, rescaling in float64, normalising in float32.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from PIL import Image

from .image_config import ImageProcessorConfig

_WHITE = (255, 255, 255, 255)


def preprocess(image: Image.Image, config: ImageProcessorConfig) -> npt.NDArray[np.float32]:
    """float32 ``[3, height, width]``, contiguous, of a Pillow picture of any mode; ``config.output_size`` if fixed."""
    rgb = _on_white(image) if config.convert_rgb else image.convert("RGB")
    if config.pad_to_square:
        rgb = _pad_to_square(rgb, config.mean)
    if config.resize is not None:
        rgb = rgb.resize(_target_size(rgb.size, config.resize), config.resample)
    pixels = np.asarray(rgb)
    if config.crop is not None:
        pixels = _crop_centre(pixels, config.crop)
    table = _value_table(config)
    return np.stack([table[channel][pixels[..., channel]] for channel in range(3)])


def digest(pixels: npt.NDArray[np.float32]) -> str:
    """SHA-256, in hex, of the preprocessed pixels' bytes (little endian, row by row)."""
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype="<f4").tobytes()).hexdigest()


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, what is transparent (an alpha channel or a colour key) blended onto white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")


def _pad_to_square(image: Image.Image, mean: tuple[float, float, float] | None) -> Image.Image:
    """The picture in the middle of a square of the mean colour, as LLaVA 1.5 was trained with."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    red, green, blue = mean or (0.0, 0.0, 0.0)
    square = Image.new("RGB", (side, side), (int(red * 255), int(green * 255), int(blue * 255)))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


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
