"""The methods, one file each. To add one: write its file, name its settings class here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import NamedTuple

from ...config import Formats
from ...errors import BadInput
from .attentionpack import AttentionPack
from .avl import Avl
from .base import Kept, Method, Policy, PromptLayer, Prune, Settlement, StepLayer, pruned
from .coarse import Coarse
from .distinct import Distinct
from .fastv import FastV
from .full import Full
from .h2o import H2O
from .random import Random
from .streaming import Streaming

Settings = (
    type[Full]
    | type[Avl]
    | type[AttentionPack]
    | type[Coarse]
    | type[Distinct]
    | type[H2O]
    | type[FastV]
    | type[Random]
    | type[Streaming]
)
_ALL: tuple[Settings, ...] = (Full, Avl, AttentionPack, Distinct, Coarse, H2O, FastV, Streaming, Random)
METHODS: dict[str, Settings] = {method.name: method for method in _ALL}

__all__ = [
    "H2O",
    "METHODS",
    "AttentionPack",
    "Avl",
    "Choice",
    "Coarse",
    "Distinct",
    "FastV",
    "Full",
    "Kept",
    "Method",
    "Policy",
    "PromptLayer",
    "Prune",
    "Random",
    "Settlement",
    "StepLayer",
    "Streaming",
    "candidates",
    "method_parameters",
    "pruned",
]


class Choice(NamedTuple):
    """A method with its settings, and the formats of its tiers."""

    method: Method
    formats: Formats


def candidates(
    name: str, parameters: Mapping[str, float], fitted: bool, formats: Formats | None = None
) -> Iterator[Choice]:
    """A method's settings to choose from, best answers first.

    ``fitted``: parameters that were not given may be picked to fit a budget; otherwise they take their defaults.
    ``formats`` None: the method's usual ones. Raises :class:`BadInput` for an unknown method or parameter.
    """
    if formats and name == Coarse.name:
        _check_coarse(formats)
    usual = AttentionPack.formats if name == AttentionPack.name else Formats()
    yield from (Choice(method, formats or usual) for method in _settings(name, parameters, fitted))


def _settings(name: str, parameters: Mapping[str, float], fitted: bool) -> Iterator[Method]:
    if name not in METHODS:
        raise BadInput(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    known = {field.name for field in fields(method)}
    for parameter in parameters:
        if parameter not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise BadInput(f"method {name!r} takes no {parameter!r}, {method_parameters(parameter)}; it takes {takes}")
    rungs: Iterator[Method] = method.ladder(parameters) if fitted else iter(())
    first = next(rungs, None)
    # Fixed parameters that leave a ladder without a rung exclude each other: the settings themselves say how.
    yield first or method(**parameters)  # type: ignore[arg-type]
    yield from rungs


def _check_coarse(formats: Formats) -> None:
    if formats.core != formats.secondary:
        raise BadInput("coarse picks its core anew at every step: give core and secondary rows the same format")
    if formats.core.startswith("lowrank"):
        raise BadInput(
            "coarse scans the keys of stored rows, which low-rank ones have to be rebuilt for: choose int8 or int4"
        )


def method_parameters(parameter: str) -> str:
    """Whose parameter it is, in words."""
    owners = [name for name, kind in METHODS.items() if parameter in {field.name for field in fields(kind)}]
    return f"a parameter of {' and '.join(owners)}" if owners else "a parameter of no method"
