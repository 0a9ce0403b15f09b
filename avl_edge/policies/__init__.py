"""The methods, one file each. To add one: write its file, name its settings class here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from ..errors import BadInput
from .avl import Avl
from .base import Kept, Method, Policy, PromptLayer, Settlement, StepLayer
from .fastv import FastV
from .full import Full
from .h2o import H2O
from .streaming import Streaming

Settings = type[Full] | type[Avl] | type[H2O] | type[FastV] | type[Streaming]
METHODS: dict[str, Settings] = {method.name: method for method in (Full, Avl, H2O, FastV, Streaming)}

__all__ = [
    "H2O",
    "METHODS",
    "Avl",
    "FastV",
    "Full",
    "Kept",
    "Method",
    "Policy",
    "PromptLayer",
    "Settlement",
    "StepLayer",
    "Streaming",
    "candidates",
]


def candidates(name: str | None, parameters: Mapping[str, float], fitted: bool) -> Iterator[Method]:
    """The settings to choose from, best answers first.

    ``name`` None means full attention and, where a budget is to be met, then A-VL. ``fitted``: parameters that were not
    given may be picked to fit a budget; otherwise they take their defaults. Raises :class:`BadInput` for an unknown
    method or parameter.
    """
    if name is None:
        for parameter in parameters:
            raise BadInput(f"{parameter!r} is a parameter {_hint(parameter)}: name the method, as in --method avl")
        yield from candidates("full", {}, fitted)
        if fitted:
            yield from candidates("avl", {}, fitted)
        return
    if name not in METHODS:
        raise BadInput(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    known = {field.name for field in fields(method)}
    for parameter in parameters:
        if parameter not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise BadInput(f"method {name!r} takes no {parameter!r}, a parameter {_hint(parameter)}; it takes {takes}")
    yield from method.ladder(parameters) if fitted else iter([method(**parameters)])  # type: ignore[arg-type]


def _hint(parameter: str) -> str:
    """Whose parameter it is."""
    owners = [name for name, kind in METHODS.items() if parameter in {field.name for field in fields(kind)}]
    return f"of {' and '.join(owners)}" if owners else "of no method"
