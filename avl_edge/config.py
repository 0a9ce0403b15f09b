"""Shapes, options and sizes: frozen data that every wing reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from .errors import BadInput, BadModel

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*([a-zA-Z]*)\s*")

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all) while something takes long: tensors loaded, files written, questions asked."""


@dataclass(frozen=True)
class KvShape:
    """What one row (the K and V of one token in one layer) weighs, and how many layers hold rows."""

    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: K and V of all key/value heads."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize


_FORMAT = re.compile(r"exact|int8|int8/int4|int4|lowrank:[1-9][0-9]{0,4}(@[1-9][0-9]{0,4})?(\+int8)?")


@dataclass(frozen=True)
class Formats:
    """In which format the rows of each tier are stored (see :mod:`avl_edge.kv.formats`).

    ``exact`` is the model's own dtype, ``int8`` about half of it and ``int4`` about 28 %; ``int8/int4`` has keys in
    int8 and values in int4; ``lowrank:R`` keeps R coefficients of K and V each (AttentionPack), ``lowrank:R+int8``
    keeps them in int8, and ``lowrank:R@r`` reads only the first r of them. Text grows by single rows, so it has no
    low-rank format.
    """

    text: str = "exact"
    core: str = "exact"
    secondary: str = "exact"

    def __post_init__(self) -> None:
        for tier, name in self.by_tier().items():
            require(
                isinstance(name, str) and _FORMAT.fullmatch(name) is not None,
                f"the {tier} format must be exact, int8, int8/int4, int4, lowrank:R or lowrank:R+int8, not {name!r}",
            )
        low_rank = self.text.startswith("lowrank")
        require(not low_rank, "text rows cannot be low-rank: choose exact, int8, int8/int4 or int4")

    def by_tier(self) -> dict[str, str]:
        return {"text": self.text, "core": self.core, "secondary": self.secondary}

    @property
    def stored(self) -> Formats:
        """The same without what is left unread: ``lowrank:R@r`` is stored as ``lowrank:R``."""
        return Formats(*(re.sub("@[0-9]+", "", name) for name in self.by_tier().values()))

    @property
    def all_exact(self) -> bool:
        return set(self.by_tier().values()) == {"exact"}


@dataclass(frozen=True)
class PromptShape:
    """How many tokens of each kind a prompt has, in tokens.

    ``prefix`` is the text before the first image (all text, if there is no image), which A-VL never evicts;
    ``images`` the total of all images; ``suffix`` the text after the first image began.
    """

    prefix: int
    images: int
    suffix: int

    @property
    def length(self) -> int:
        return self.prefix + self.images + self.suffix


@dataclass(frozen=True)
class Options:
    """How to answer one request.

    ``method`` names a policy of :mod:`avl_edge.kv.methods`; None takes ``full`` where it fits ``kv_budget``, and where
    it does not what answers best by measurement. ``parameters`` are that policy's own, by field name; those left out
    take their defaults, or are picked to fit ``kv_budget`` (bytes, or a size like "160MB"; None: no limit but the
    pool's). ``formats`` of the tiers; None: exact, or, without a method, packed as far as ``kv_budget`` asks.
    ``preset`` names a measured setting instead of all these (:mod:`avl_edge.kv.quality`). ``temperature`` 0 is greedy.
    """

    method: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    formats: Formats | None = None
    preset: str | None = None
    kv_budget: int | str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(isinstance(self.method, str | None), f"method must be a name, not {self.method!r}")
        require(isinstance(self.parameters, Mapping), "parameters must be a mapping from names to numbers")
        require(isinstance(self.formats, Formats | None), f"formats must be avl_edge.Formats, not {self.formats!r}")
        own = self.method or self.parameters or self.formats or self.kv_budget is not None
        require(
            not (self.preset and own), "a preset stands for method, parameters, formats and budget: give none beside it"
        )
        for name, value in self.parameters.items():
            require(_is_number(value), f"parameter {name!r} must be a number, not {value!r}")
        for name in ("max_new_tokens", "seed"):
            require(_is_whole(getattr(self, name)), f"{name} must be a whole number, not {getattr(self, name)!r}")
        for name in ("temperature", "top_p"):
            require(_is_number(getattr(self, name)), f"{name} must be a number, not {getattr(self, name)!r}")
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        require(
            self.temperature == 0 or 0.001 <= self.temperature <= 100,
            f"temperature must be 0 or from 0.001 to 100, not {self.temperature}",
        )
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require(0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        require(self.kv_budget_bytes != 0, "the KV budget must be more than 0 bytes")

    @property
    def kv_budget_bytes(self) -> int | None:
        """``kv_budget`` in bytes."""
        if self.kv_budget is None or isinstance(self.kv_budget, str):
            return None if self.kv_budget is None else parse_size(self.kv_budget)
        require(_is_whole(self.kv_budget), f"kv_budget must be bytes or a size like '160MB', not {self.kv_budget!r}")
        require(self.kv_budget >= 0, "the KV budget must be more than 0 bytes")
        return self.kv_budget


def checked_options(options: Options | None) -> Options:
    """The options that were given, or the defaults; :class:`BadInput` for anything else."""
    require(isinstance(options, Options | None), f"options must be avl_edge.Options, not {type(options).__name__}")
    return options or Options()


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def require(holds: bool, message: str) -> None:
    """Raise :class:`BadInput` with ``message`` unless ``holds``."""
    if not holds:
        raise BadInput(message)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``160MB``, ``1.5 GiB`` or ``4096``; decimal and binary units are distinct."""
    match = _SIZE.fullmatch(text)
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNITS:
        raise BadInput(f"cannot read {text!r} as a size: give a number with B, kB, MB, GB, KiB, MiB or GiB, like 160MB")
    count = int(Fraction(match.group(1)) * _UNITS[unit])
    require(count < 2**63, f"{text[:40]} is more memory than any machine has")
    return count


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


def format_size(count: int) -> str:
    """A byte count for people, in decimal units: ``format_size(162_800_000) == '162.8 MB'``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def read_text(path: Path) -> str | None:
    """The text of a model's file, or None if there is no such file; :class:`BadModel` if it is not readable UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadModel(f"{path} cannot be read ({reason}): copy the checkpoint again") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a model's file, or None if there is no such file; :class:`BadModel` for anything else."""
    text = read_text(path)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadModel(f"{path} is not valid JSON ({error}): copy the checkpoint again") from None
    if not isinstance(content, dict):
        raise BadModel(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
