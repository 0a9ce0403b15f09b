"""The methods by name, and their settings to choose from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import NamedTuple, TypeVar

from ...config import Formats, require
from ...errors import BadInput
from .attentionpack import AttentionPack
from .avl import Avl
from .base import Method, Parameter
from .coarse import Coarse
from .distinct import Distinct
from .fastv import FastV
from .full import Full
from .h2o import H2O
from .random import Random
from .streaming import Streaming

METHODS: dict[str, type[Method]] = {}
"""Every method that is known, by its name: those of this package, and what :func:`register` added."""

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Make a method known by its name: to requests, budgets, estimates, image sessions and the command line (whose
    ``--help`` lists what is registered before ``avl_edge.cli`` is imported). May stand above ``@dataclass``.

    Raises :class:`BadInput` for a name that another method has, and for a class that leaves out a part of a method.
    """
    where = _path(method)
    require(
        _NAME.fullmatch(method.name) is not None,
        f"{where} needs a name of lower-case letters, digits, _ and -, not {method.name!r}",
    )
    if method.name in METHODS:
        raise BadInput(f"{method.name!r} is {_path(METHODS[method.name])} already: give {where} another name")
    require("__dataclass_fields__" in vars(method), f"{where} must be a dataclass: put @dataclass(frozen=True) above")
    left_out = [name for name, text in (("summary", method.summary), ("source", method.source)) if not text]
    left_out += sorted(method.__abstractmethods__) if inspect.isabstract(method) else []
    require(not left_out, f"{where} leaves out {', '.join(left_out)}: see {Method.__module__}.Method")
    plain = {field.name for field in fields(method)} - _parameters(method).keys()
    require(not plain, f"{where} has fields that are no parameters: make {', '.join(sorted(plain))} by parameter()")
    METHODS[method.name] = method
    return method


def _path(method: type[Method]) -> str:
    return f"{method.__module__}.{method.__qualname__}"


class Choice(NamedTuple):
    """A method with its settings, and the formats of its tiers."""

    method: Method
    formats: Formats


def candidates(
    name: str, parameters: Mapping[str, float], fitted: bool, formats: Formats | None = None
) -> Iterator[Choice]:
    """A method's settings to choose from, best answers first.

    ``fitted``: parameters that were not given may be picked to fit a budget; otherwise they take their defaults.
    ``formats`` None: the method's usual ones. Raises :class:`BadInput` for an unknown method or parameter, and for
    formats that the method refuses.
    """
    if name not in METHODS:
        raise BadInput(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    kind = METHODS[name]
    if formats:
        kind.check_formats(formats)
    yield from (Choice(method, formats or kind.formats) for method in _settings(kind, parameters, fitted))


def _settings(kind: type[Method], parameters: Mapping[str, float], fitted: bool) -> Iterator[Method]:
    known = _parameters(kind)
    for parameter in parameters:
        if parameter not in known:
            takes = ", ".join(sorted(known)) or "none"
            whose = method_parameters(parameter)
            raise BadInput(f"method {kind.name!r} takes no {parameter!r}, {whose}; it takes {takes}")
    rungs: Iterator[Method] = kind.ladder(parameters) if fitted else iter(())
    first = next(rungs, None)
    # Fixed parameters that leave a ladder without a rung exclude each other: the settings themselves say how.
    yield first or kind(**parameters)
    yield from rungs


def _parameters(kind: type[Method]) -> dict[str, Parameter]:
    return {each.name: each for each in kind.parameters()}


def check_layers(name: str, parameters: Mapping[str, float], layers: int) -> None:
    """:class:`BadInput` for a parameter that names a layer which a model of so many ``layers`` does not have."""
    for each in METHODS[name].parameters() if name in METHODS else ():
        value = parameters.get(each.name, 0)
        if each.is_layer and value >= layers:
            raise BadInput(
                f"{each.name} is layer {value:g}, but the model has {layers} layers: give one from 0 to {layers - 1}"
            )


def method_parameters(parameter: str) -> str:
    """Whose parameter it is, in words."""
    owners = _owners(parameter)
    return f"a parameter of {', '.join(owners)}" if owners else "a parameter of no method"


def parameter_without_method(parameter: str) -> str:
    """What to say of a parameter that was given without a method."""
    owners = list(_owners(parameter))
    cure = f"name the method, as in --method {owners[0]}" if owners else "avl-edge methods lists what there is"
    return f"{parameter!r} is {method_parameters(parameter)}: {cure}"


def parameter_help(parameter: str) -> str:
    """What a parameter is, for an option of its own, in the words of the first method that takes it:
    ``C: percent of image rows read on an ordinary step.``"""
    of = next(iter(_owners(parameter).values()))
    return f"{of.symbol}: {of.help}." if of.symbol else f"{of.help}."


def parameter_defaults(parameter: str) -> str:
    """Its default for each method that takes it: ``avl 30, coarse 40``."""
    return ", ".join(f"{name} {of.default:g}" for name, of in _owners(parameter).items())


def _owners(parameter: str) -> dict[str, Parameter]:
    """The methods that take it, by name."""
    all_parameters = ((name, _parameters(kind)) for name, kind in METHODS.items())
    return {name: known[parameter] for name, known in all_parameters if parameter in known}


def sharing_methods() -> list[str]:
    """The methods whose rows several questions may share, those first that need no parameters for it."""
    as_they_are = [name for name, kind in METHODS.items() if kind().shared_percent is not None]
    return as_they_are + [name for name, kind in METHODS.items() if name not in as_they_are and kind.shared_with]


for _method in (Full, Avl, AttentionPack, Distinct, Coarse, H2O, FastV, Streaming, Random):
    register(_method)
