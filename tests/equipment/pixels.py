"""Pixels of a prompt's pictures as one array, as transformers takes those of LLaVA-1.5, and back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from avl_edge.model.spec import ModelSpec
from avl_edge.request import Pixels, PixelValues, Prompt


def stacked(prompt: Prompt) -> npt.NDArray[np.float32]:
    """float32 ``[images, 3, H, W]``."""
    assert prompt.pixel_values is not None
    return np.stack([each.values for each in prompt.pixel_values.pictures])


def as_pixels(spec: ModelSpec, pixels: npt.NDArray[np.float32]) -> Pixels | None:
    """``[images, 3, H, W]`` as a prompt has them."""
    return Pixels(as_pictures(spec, pixels)) if len(pixels) else None


def as_pictures(spec: ModelSpec, pixels: npt.NDArray[np.float32]) -> tuple[PixelValues, ...]:
    """``[images, 3, H, W]`` as the vision encoder takes it."""
    return tuple(PixelValues(each, spec.picture(1, 1)) for each in pixels)
