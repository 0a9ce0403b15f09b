"""The image processor's settings of a model directory, checked and reduced to what `preprocess` does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import BadModel, quoted, shortened
from ..image_settings import read_image_settings

Kinds = Mapping[str, Mapping[str, Any]]
"""By the name of an image processor: its defaults."""

CLIP: Mapping[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": Image.Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "do_pad": False,
}
_SIGLIP: Mapping[str, Any] = dict(CLIP) | {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
_MOST_LENGTH = 4096
# What a key that a settings file leaves out means for each kind of processor. A flag that is null is off.
_SQUARE: Kinds = {"LlavaImageProcessor": CLIP, "CLIPImageProcessor": CLIP, "SiglipImageProcessor": _SIGLIP}


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How a picture becomes pixel values. Sizes are (height, width) in pixels; None leaves a step out.

    ``resize`` as one number is the length of the shortest edge. ``mean`` and ``std`` are per channel and both set or
    both None. ``pad_to_square`` fills up with the mean's colour before resizing.
    """

    resize: int | tuple[int, int] | None = 224
    resample: Image.Resampling = Image.Resampling.BICUBIC
    crop: tuple[int, int] | None = (224, 224)
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, float, float] | None = CLIP["image_mean"]
    std: tuple[float, float, float] | None = CLIP["image_std"]
    pad_to_square: bool = False

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every preprocessed picture, or None if it depends on the picture."""
        if self.crop is not None:
            return self.crop
        if isinstance(self.resize, int):
            return (self.resize, self.resize) if self.pad_to_square else None
        return self.resize

    @classmethod
    def open(cls, directory: Path, kinds: Kinds = _SQUARE) -> ImageProcessorConfig:
        """Reads processor_config.json's "image_processor" if it has one, else preprocessor_config.json. ``kinds``: what
        the settings may be of, the first where they do not say, and what each leaves out.

        Raises BadModel if neither exists, or if a setting is broken or unsupported.
        """
        return cls.parse(*read_image_settings(directory), kinds)

    @classmethod
    def parse(cls, settings: Any, where: str, kinds: Kinds = _SQUARE) -> ImageProcessorConfig:
        """From the settings as transformers writes them; ``where`` names their origin in a BadModel's message."""
        if not isinstance(settings, Mapping):
            raise BadModel(f"{where}: the image processor's settings must be a JSON object")
        kind = _kind(settings, where, kinds)
        reader = _Reader(dict(kinds[kind]) | dict(settings), where)
        if kind != "LlavaImageProcessor" and reader.flag("do_pad") and settings.get("pad_size"):
            raise BadModel(f"{where}: pad_size is not supported for {kind}")
        resize, normalize = reader.flag("do_resize"), reader.flag("do_normalize")
        pads = kind == "LlavaImageProcessor" and reader.flag("do_pad")
        if pads and not resize:
            raise BadModel(f"{where}: do_pad without do_resize would keep squares at full size: set do_resize")
        return cls(
            resize=reader.size("size") if resize else None,
            resample=reader.resample() if resize else Image.Resampling.BICUBIC,
            crop=reader.crop() if reader.flag("do_center_crop") else None,
            rescale_factor=reader.number("rescale_factor") if reader.flag("do_rescale") else None,
            mean=reader.channels("image_mean") if normalize else None,
            std=reader.channels("image_std", positive=True) if normalize else None,
            pad_to_square=pads,
        )


def _kind(settings: Mapping[str, Any], where: str, kinds: Kinds) -> str:
    declared = settings.get("image_processor_type") or settings.get("feature_extractor_type") or next(iter(kinds))
    kind = str(declared).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind not in kinds:
        known = ", ".join(sorted(kinds))
        raise BadModel(f"{where}: image processor {shortened(str(declared), 60)} is not supported, only {known}")
    return kind


@dataclass(frozen=True)
class _Reader:
    """Typed access to the settings; every complaint names the file, the key and the value."""

    settings: Mapping[str, Any]
    where: str

    def _bad(self, key: str, wanted: str) -> BadModel:
        return BadModel(f"{self.where}: {key} must be {wanted}, not {quoted(self.settings[key])}")

    def flag(self, key: str) -> bool:
        if not isinstance(self.settings[key], bool | None):
            raise self._bad(key, "true or false")
        return bool(self.settings[key])

    def number(self, key: str) -> float:
        if not _is_number(self.settings[key]):
            raise self._bad(key, "a number")
        return float(self.settings[key])

    def channels(self, key: str, positive: bool = False) -> tuple[float, float, float]:
        value = self.settings[key]
        values = [value] * 3 if _is_number(value) else value
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_number, values)):
            raise self._bad(key, "a list of 3 numbers")
        if positive and min(values) <= 0:
            raise self._bad(key, "a list of 3 positive numbers")
        return float(values[0]), float(values[1]), float(values[2])

    def size(self, key: str) -> int | tuple[int, int]:
        value = self.settings[key]
        if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
            value = value["shortest_edge"]
        elif isinstance(value, Mapping) and set(value) == {"height", "width"}:
            value = [value["height"], value["width"]]
        if _is_length(value):
            return int(value)
        if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_length, value)):
            return int(value[0]), int(value[1])
        raise self._bad(key, 'a positive number of pixels, {"shortest_edge"} or {"height", "width"}')

    def crop(self) -> tuple[int, int]:
        value = self.settings["crop_size"]
        if isinstance(value, Mapping) and "shortest_edge" in value:
            raise self._bad("crop_size", 'a positive number of pixels or {"height", "width"}')
        size = self.size("crop_size")
        return (size, size) if isinstance(size, int) else size

    def resample(self) -> Image.Resampling:
        try:
            return Image.Resampling(self.settings["resample"])
        except ValueError:
            raise self._bad("resample", "the number of a Pillow filter, 0 to 5") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_LENGTH
