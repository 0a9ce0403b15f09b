"""Sections of a config.json, read field by field; a complaint names the section and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadModel, quoted

# What no model has more of. A larger number is a damaged file, or one that is meant to exhaust memory.
_MOST = {
    "num_hidden_layers": 1 << 10,
    "image_size": 1 << 12,
    "max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 24,
}
_MOST_OF_OTHERS = 1 << 22
_MOST_NUMBER = 1e30


class Fields:
    """One section of config.json, with its defaults and its name for messages."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> None:
        self.values, self.defaults, self.name = values, defaults, name

    def section(self, key: str) -> Fields:
        if not isinstance(self.values.get(key), dict):
            raise BadModel(f"{self.name} has no {key}: it must be the section that describes that part of the model")
        return Fields(self.values[key], {}, f"{self.name}, {key}")

    def with_defaults(self, *defaults: Mapping[str, Any]) -> Fields:
        return Fields(self.values, {key: value for part in defaults for key, value in part.items()}, self.name)

    def get(self, key: str) -> Any:
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def size(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadModel(f"{self.name}: {key} must be a positive whole number, not {quoted(value)}")
        most = _MOST.get(key, _MOST_OF_OTHERS)
        if value > most:
            raise BadModel(f"{self.name}: {key} is {quoted(value)}, and no model has more than {most}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _MOST_NUMBER:
            raise BadModel(f"{self.name}: {key} must be a positive number, not {quoted(value)}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise BadModel(f"{self.name}: {key} must be true or false, not {quoted(value)}")
        return bool(value)

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise BadModel(f"{self.name}: {key} must be a string, not {quoted(value)}")
        return value

    def one_of(self, key: str, known: tuple[str, ...], default: str) -> str:
        value = self.values.get(key, default)
        if value not in known:
            raise BadModel(f"{self.name}: {key} {quoted(value)} is not supported: it must be one of {', '.join(known)}")
        return str(value)


def divides(name: str, divisor_name: str, divisor: int, whole_name: str, whole: int) -> None:
    """:class:`BadModel` unless it does."""
    if whole % divisor:
        raise BadModel(f"{name}: {whole_name} {whole} is not a multiple of {divisor_name} {divisor}")
