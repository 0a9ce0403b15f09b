"""To RGB of eight bits, whatever a picture's values are; and one rule for what is transparent in it, of every kind: an
alpha channel, a transparent colour, a palette of opacities."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ...errors import BadImage

_COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def flattened(image: Image.Image, transparency: str) -> tuple[Image.Image, float]:
    """The loaded picture in RGB, the same object where it is that already, and which part of its pixels (0 to 1) is not
    opaque.

    ``transparency`` is one of :data:`~avl_edge.config.TRANSPARENCY`. Of values of 16 bits the high byte is taken.
    :class:`BadImage` for values of 32 bits, whose range nothing says.
    """
    if image.mode in ("I", "F"):
        raise BadImage(
            f"the picture has values of 32 bits (mode {image.mode}), and nothing says which of them is white: scale "
            "them to 8 or 16 bits"
        )
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    alpha = _alpha(image)
    share = 0.0 if alpha is None else 1 - alpha.histogram()[255] / (image.width * image.height)
    colours = _colours(image)
    if not share or transparency == "drop":
        return colours, share
    canvas = Image.new("RGB", image.size, _COLOURS[transparency])
    canvas.paste(colours, mask=alpha)
    return canvas, share


def _is_wide(image: Image.Image) -> bool:
    return image.mode.startswith("I;16")


def _colours(image: Image.Image) -> Image.Image:
    """RGB, as if everything were opaque."""
    if image.mode == "RGB":
        return image
    if _is_wide(image):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:  # which Pillow would convert too, or warn about
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    """One opacity a pixel (mode L), or None where all are opaque."""
    if "A" in image.getbands():
        return image.getchannel("A")
    key = image.info.get("transparency")
    if key is None:
        return None
    values = np.asarray(image)
    if image.mode == "P":
        return Image.fromarray(_opacities(key)[values])
    if isinstance(key, tuple):
        seen_through = values[..., 0] == key[0]
        for channel in (1, 2):
            seen_through &= values[..., channel] == key[channel]
    elif isinstance(key, int):
        seen_through = values == (bool(key) if image.mode == "1" else key)
    else:
        return None
    return Image.fromarray(np.where(seen_through, np.uint8(0), np.uint8(255)))


def _opacities(key: int | bytes) -> np.ndarray:
    """uint8 ``[256]``, by the index of a palette's colour."""
    opacities = np.full(256, 255, dtype=np.uint8)
    if isinstance(key, bytes):
        opacities[: len(key)] = np.frombuffer(key[:256], dtype=np.uint8)
    elif 0 <= key < 256:
        opacities[key] = 0
    return opacities
