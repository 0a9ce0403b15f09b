"""Settings as people write them: ``coarse:format=int4:mass=90``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...config import Formats, format_names, parse_parameter

_FORMATS = ("text_format", "core_format", "secondary_format", "format")


@dataclass(frozen=True)
class Notation:
    """A method's name, parameters that stay as they are, and formats (None: the method's usual ones)."""

    name: str
    parameters: dict[str, float] = field(default_factory=dict)
    formats: Formats | None = None


def parse(text: str) -> Notation:
    """Read ``NAME[:PARAMETER=VALUE]...``; among the parameters may be ``text_format``, ``core_format``,
    ``secondary_format`` and ``format``, which is that of every tier without one of its own.

    :class:`BadInput` for what is no parameter; the method itself is not looked at.
    """
    # A rank follows a colon too: lowrank:64 is one word.
    name, *words = text.replace("lowrank:", "lowrank\0").split(":")
    formats: dict[str, str] = {}
    parameters: dict[str, float] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key.strip() in _FORMATS:
            formats[key.strip()] = value.strip().replace("\0", ":")
        else:
            parameters.update([parse_parameter(word.replace("\0", ":"))])
    return Notation(name.strip(), parameters, format_names(*(formats.get(tier) for tier in _FORMATS)))
