"""Shapes, options and sizes: frozen data that every wing reads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeGuard

from .errors import BadInput

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
            others = "" if tier == "text" else ", lowrank:R, lowrank:R+int8"
            require(
                isinstance(name, str) and _FORMAT.fullmatch(name) is not None,
                f"the {tier} format must be one of exact, int8, int8/int4, int4{others}, not {name!r}",
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
    ``images`` the total of all images; ``suffix`` the text after the first image began. ``spans``: the place of each
    image's first token and their number, where there are several images; without them all are one run.
    """

    prefix: int
    images: int
    suffix: int
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def length(self) -> int:
        return self.prefix + self.images + self.suffix


@dataclass(frozen=True)
class Picture:
    """What a picture's size decides: ``crops`` runs of the vision encoder over ``patches`` each give ``tokens`` for the
    decoder. ``rows`` and ``columns``: the grid in which these stand; ``tiles``: rows and columns of crops. ``moment``:
    the place of two frames in their video, and ``seconds``: their times."""

    crops: int
    patches: int
    tokens: int
    rows: int = 0
    columns: int = 0
    tiles: tuple[int, int] = (1, 1)
    moment: int | None = None
    seconds: tuple[float, float] = (0.0, 0.0)


_RANGES = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}
_MOST_BIASES, _MOST_STOPS, _LONGEST_STOP, _MOST_LOGPROBS = 1024, 16, 256, 20
_LONGEST_SCHEMA = 2**16


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen from the model's logits, and what ends its answer before the model does.

    In this order, which is that of transformers and vLLM:

    - ``logit_bias``: what is added to the logits of single tokens, by id, -100 to 100;
    - ``repetition_penalty``: positive logits of tokens that are in the prompt or the answer are divided by it, negative
      ones multiplied;
    - ``frequency_penalty`` is subtracted from a token's logit for each time that it is in the answer,
      ``presence_penalty`` once;
    - ``temperature`` divides the logits; 0 takes the likeliest token, and nothing below counts;
    - ``top_k`` likeliest tokens are left (0: all), then the fewest that together reach ``top_p``, then those that are
      at least ``min_p`` times as likely as the likeliest.

    ``seed`` repeats the draws; None takes one from the system, which the result names. ``stop``: a string, or several,
    before which the answer ends. ``logprobs``: give the log-probability of each token, and of so many of the likeliest
    in its place; None: of none. ``json_schema``: JSON; an answer that is not cut satisfies it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            _require_within(name, getattr(self, name), least, most)
        require(not 0 < self.temperature < 0.001, "temperature must be 0, or a number from 0.001 to 100")
        require(self.top_p > 0, "top_p must be above 0 and at most 1")
        _require_whole("top_k", self.top_k, 2**31 - 1)
        if self.seed is not None:
            _require_whole("seed", self.seed, 2**63 - 1)
        if self.logprobs is not None:
            _require_whole("logprobs", self.logprobs, _MOST_LOGPROBS)
        fits = self.json_schema is None or len(self.json_schema) <= _LONGEST_SCHEMA
        require(fits, f"json_schema must be JSON of at most {_LONGEST_SCHEMA} characters")
        self._check_logit_bias()
        self._check_stop()

    def _check_logit_bias(self) -> None:
        require(isinstance(self.logit_bias, Mapping), "logit_bias must be a mapping from token ids to numbers")
        require(len(self.logit_bias) <= _MOST_BIASES, f"logit_bias takes at most {_MOST_BIASES} tokens")
        for token, bias in self.logit_bias.items():
            _require_whole("a token id of logit_bias", token, 2**31 - 1)
            _require_within(f"the logit_bias of token {token}", bias, -100, 100)

    def _check_stop(self) -> None:
        require(isinstance(self.stop, str | Sequence), f"stop must be strings, not {type(self.stop).__name__}")
        require(len(self.stop_strings) <= _MOST_STOPS, f"stop takes at most {_MOST_STOPS} strings")
        for each in self.stop_strings:
            require(isinstance(each, str), f"a stop string must be a string, not {type(each).__name__}")
            require(0 < len(each) <= _LONGEST_STOP, f"a stop string must have 1 to {_LONGEST_STOP} characters")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


TRANSPARENCY = ("drop", "white", "black")
"""What becomes of a picture's transparent parts: shown in the colours that they have, or on a background."""


@dataclass(frozen=True)
class Options(Sampling):
    """How to answer one request.

    ``method`` names a policy of :mod:`avl_edge.kv.methods`; None takes ``full`` where it fits ``kv_budget``, and where
    it does not what answers best by measurement. ``parameters`` are that policy's own, by field name; those left out
    take their defaults, or are picked to fit ``kv_budget`` (bytes, or a size like "160MB"; None: no limit but the
    pool's). ``formats`` of the tiers; None: exact, or, without a method, packed as far as ``kv_budget`` asks.
    ``preset`` names a measured setting instead of all these (:mod:`avl_edge.kv.quality`). What :class:`Sampling` has
    beside these is given by name. ``min_pixels`` and ``max_pixels``: to which each picture is resized, for models that
    take any size; None: as the checkpoint says. ``transparency``: one of :data:`TRANSPARENCY`; None: as the model's
    family has it.
    """

    method: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    formats: Formats | None = None
    preset: str | None = None
    kv_budget: int | str | None = None
    max_new_tokens: int = 256
    min_pixels: int | None = None
    max_pixels: int | None = None
    transparency: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.method, str | None), f"method must be a name, not {self.method!r}")
        require(isinstance(self.parameters, Mapping), "parameters must be a mapping from names to numbers")
        require(isinstance(self.formats, Formats | None), f"formats must be avl_edge.Formats, not {self.formats!r}")
        shown = self.transparency is None or self.transparency in TRANSPARENCY
        require(shown, f"transparency must be one of {', '.join(TRANSPARENCY)}, not {self.transparency!r}")
        own = self.method or self.parameters or self.formats or self.kv_budget is not None
        require(
            not (self.preset and own), "a preset stands for method, parameters, formats and budget: give none beside it"
        )
        for name, value in self.parameters.items():
            require(_is_number(value), f"parameter {name!r} must be a number, not {value!r}")
        require(_is_whole(self.max_new_tokens), f"max_new_tokens must be a whole number, not {self.max_new_tokens!r}")
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        require(self.kv_budget_bytes != 0, "the KV budget must be more than 0 bytes")
        for name, pixels in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            if pixels is not None:
                _require_whole(name, pixels, 2**31 - 1)
                require(pixels > 0, f"{name} must be at least 1")

    @property
    def kv_budget_bytes(self) -> int | None:
        if self.kv_budget is None or isinstance(self.kv_budget, str):
            return None if self.kv_budget is None else parse_size(self.kv_budget)
        require(_is_whole(self.kv_budget), f"kv_budget must be bytes or a size like '160MB', not {self.kv_budget!r}")
        require(self.kv_budget >= 0, "the KV budget must be more than 0 bytes")
        return self.kv_budget


def checked_options(options: Options | None) -> Options:
    """The options that were given, or the defaults."""
    require(isinstance(options, Options | None), f"options must be avl_edge.Options, not {type(options).__name__}")
    return options or Options()


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _require_within(name: str, value: object, least: float, most: float) -> None:
    holds = _is_number(value) and least <= value <= most
    require(holds, f"{name} must be a number from {least} to {most}")


def _require_whole(name: str, value: object, most: int) -> None:
    require(_is_whole(value) and 0 <= value <= most, f"{name} must be a whole number from 0 to {most}")


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


def size_in_bytes(name: str, value: object) -> int:
    """Bytes of a size that is given as a number or as text; :class:`BadInput`, by ``name``, for anything else, and for
    nothing."""
    size = parse_size(value) if isinstance(value, str) else value
    if not _is_whole(size):
        raise BadInput(f"{name} must be bytes or a size like '12GB', not {value!r}")
    require(size > 0, f"{name} must be more than 0 bytes")
    return size


def format_size(count: int) -> str:
    """A byte count for people, in decimal units: ``format_size(162_800_000) == '162.8 MB'``."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
