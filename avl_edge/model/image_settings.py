"""The image processor's settings in a model's directory, as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadModel
from ..files import read_json


def read_image_settings(directory: Path) -> tuple[Any, str]:
    """The image processor's settings in a model's directory, as they are written, and what they are read from."""
    settings, where = find_image_settings(directory)
    if settings is None:
        raise BadModel(f"{directory} has no preprocessor_config.json: download the model's processor files")
    return settings, where


def find_image_settings(directory: Path) -> tuple[Any, str]:
    """The same, or None for the settings where there are none."""
    nested, legacy = directory / "processor_config.json", directory / "preprocessor_config.json"
    settings = (read_json(nested) or {}).get("image_processor")
    if settings is not None:
        return settings, f"{nested}, image_processor"
    return read_json(legacy), str(legacy)
