"""Formats that a decoder's matrices are packed in, by name: what ``--weights`` and ``--head`` take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import require
from .spec import TextSpec

GROUPS = (32, 64, 128)
"""Inputs that may share a scale of 4-bit weights."""
_NAME = re.compile(r"int8|int4(?::([0-9]{1,3}))?")


@dataclass(frozen=True)
class WeightFormat:
    """Whole numbers of ``bits``, symmetric; ``group`` neighbouring inputs of an output share a scale, None: all of
    them."""

    bits: int
    group: int | None

    @classmethod
    def of(cls, name: str) -> WeightFormat:
        """``int8`` (a scale for each output), ``int4`` (for 128 inputs) or ``int4:GROUP``; :class:`BadInput` for
        others."""
        match = _NAME.fullmatch(name)
        group = int(match.group(1) or 128) if match else 0
        groups = ", ".join(map(str, GROUPS))
        require(
            match is not None and (name == "int8" or group in GROUPS),
            f"weights are packed as int8, int4 or int4:GROUP with a group of {groups}, not {name!r}",
        )
        return cls(8, None) if name == "int8" else cls(4, group)

    @property
    def name(self) -> str:
        """As :meth:`of` takes it, ``int4`` for groups of 128."""
        return f"int{self.bits}" if self.group in (None, 128) else f"int{self.bits}:{self.group}"

    def require_divides(self, inputs: int) -> None:
        """:class:`BadInput` where a matrix of so many ``inputs`` has no whole groups."""
        if self.group is None:
            return
        fitting = next((each for each in reversed(GROUPS) if inputs % each == 0), None)
        instead = "int8" if fitting is None else f"int4:{fitting}"
        require(
            inputs % self.group == 0,
            f"groups of {self.group} do not divide a matrix of {inputs} inputs: pack as {instead}",
        )


@dataclass(frozen=True)
class WeightFormats:
    """What a checkpoint's decoder is packed in: the matrices of its layers, and its ``head``. None leaves either as it
    is."""

    body: WeightFormat | None = None
    head: WeightFormat | None = None

    @classmethod
    def of(cls, body: str | None, head: str | None) -> WeightFormats:
        """By :meth:`WeightFormat.of`."""
        return cls(*(None if name is None else WeightFormat.of(name) for name in (body, head)))

    def named(self) -> dict[str, str]:
        """The formats by what they are of, but for those that are None."""
        names = {"weights": self.body, "head": self.head}
        return {name: each.name for name, each in names.items() if each is not None}

    def check(self, text: TextSpec) -> None:
        """:class:`BadInput` where groups do not divide the inputs of a matrix."""
        if self.body is not None:
            for inputs in (text.hidden_size, text.heads * text.head_dim, text.intermediate_size):
                self.body.require_divides(inputs)
        if self.head is not None:
            self.head.require_divides(text.hidden_size)


def stored_formats(config: Mapping[str, Any]) -> WeightFormats:
    """What config.json's ``quantization_config`` says of the decoder, for plans; what its layers are, tensors say.

    A group of another size counts as the next smaller one of :data:`GROUPS`, a scale for each output as one of 128.
    """
    section = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(section, Mapping):
        return WeightFormats()
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping):
        body = _nearest(section.get("bits"), section.get("group_size"))
        return WeightFormats(body, body if section.get("lm_head") is True else None)
    found: dict[bool, WeightFormat | None] = {}
    ignored = any("lm_head" in str(each) for each in section.get("ignore") or ())
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            form = _nearest(weights.get("num_bits"), weights.get("group_size"))
            for target in map(str, group.get("targets") or ()):
                found["lm_head" in target] = form
                if target == "Linear" and not ignored:
                    found[True] = form
    return WeightFormats(found.get(False), found.get(True))


def _nearest(bits: object, group: object) -> WeightFormat | None:
    if bits == 8:
        return WeightFormat(8, None)
    size = group if isinstance(group, int) and group > 0 else 128
    return WeightFormat(4, max((each for each in GROUPS if each <= size), default=GROUPS[0])) if bits == 4 else None
