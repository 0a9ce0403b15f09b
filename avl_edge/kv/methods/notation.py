"""Settings as people write them: ``coarse:format=int4:mass=90``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...config import Formats, require
from ...errors import BadInput

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


def format_names(text: str | None, core: str | None, secondary: str | None, every: str | None) -> Formats | None:
    """Formats from names given for single tiers and for ``every`` other one; None when none is given."""
    if text is core is secondary is every is None:
        return None
    rest = "exact" if every is None else every
    usual = ("exact" if rest.startswith("lowrank") else rest, rest, rest)
    given = zip((text, core, secondary), usual, strict=True)
    return Formats(*(default if name is None else name for name, default in given))


def parse_parameter(text: str) -> tuple[str, float]:
    """The name and value of a method's parameter, written ``NAME=VALUE``."""
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        raise BadInput(f"cannot read {text!r} as a parameter: give NAME=VALUE with a number, like refresh=3") from None
    require(math.isfinite(number), f"parameter {name.strip()!r} must be a number, not {number}")
    return name.strip().replace("-", "_"), int(number) if number.is_integer() else number
