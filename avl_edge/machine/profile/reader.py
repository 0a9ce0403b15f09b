"""From YAML to frozen data and back, strictly: an unknown key, a missing one or a wrong kind is an error with its path.

Nothing is guessed and nothing is converted, but for whole numbers where a decimal one may stand.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from ...errors import quoted, refusing
from .schema import BadProfile, Figure, Fit, Sample

T = TypeVar("T")

# What a number cannot be outside of, by the end of its key: most wrong units fall out here.
_PLAUSIBLE = {
    "total_bytes": (2**24, 2**50),
    "available_bytes": (2**20, 2**50),
    "_bytes_per_s": (1e8, 1e14),
    "_bytes": (0, 2**50),
    "_percent": (1, 10_000),
    "_us_per_layer": (0, 1e7),
    "_us_per_layer_and_sequence": (0, 1e7),
    "_us_per_scored_layer": (0, 1e7),
    "_us_per_thousand_scored_rows": (0, 1e7),
    "_ms_per_gb_of_weights": (0, 1e5),
    "_ms_per_gb_of_rows": (0, 1e5),
    "_tflop": (0, 1e9),
}


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last, and references, with which a few
    bytes stand for any number of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "references (*) are not supported", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: ARG002
        mapping = super().construct_mapping(node, deep=True)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        return mapping


class _FlowDumper(yaml.SafeDumper):
    """Numbers with their origin on one line, and no references."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


class _Line(dict[str, Any]):
    """A mapping that is written on one line."""


_FlowDumper.add_representer(
    _Line, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)


def parse(text: str, where: str) -> Any:
    """The YAML document in ``text``; :class:`BadProfile` names ``where`` and the line of what is wrong."""
    with refusing(lambda reason: BadProfile(f"{where} is not valid YAML ({reason})")):
        return yaml.load(text, Loader=_StrictLoader)


def write(value: Any) -> str:
    """``value`` as YAML, keys in the order of the dataclass."""
    plain = to_plain(value)
    return yaml.dump(plain, Dumper=_FlowDumper, sort_keys=False, width=10_000)


def to_plain(value: Any) -> Any:
    """``value`` as mappings, lists, text and numbers."""
    if is_dataclass(value):
        content = {each.name: to_plain(getattr(value, each.name)) for each in fields(value)}
        return _Line(content) if isinstance(value, (Figure, Fit, Sample)) else content
    if isinstance(value, Mapping):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(each) for each in value]
    return value


def build(kind: type[T], data: Any, where: str) -> T:
    """The dataclass ``kind`` from a mapping; :class:`BadProfile` names the key that is wrong."""
    if not isinstance(data, dict):
        raise BadProfile(f"{where} must be a mapping, not {quoted(data)}")
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise BadProfile(f"{where} has an unknown key {quoted(key)}{_meant(str(key), list(known))}")
    values = {}
    for name, each in known.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}")
        elif each.default is MISSING and each.default_factory is MISSING:
            raise BadProfile(f"{where} lacks {name}: the file is incomplete")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        options = [each for each in arguments if each is not type(None)]
        return None if value is None else _convert(options[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise BadProfile(f"{where} must be one of {', '.join(map(str, arguments))}, not {quoted(value)}")
        return value
    if origin is tuple:
        return tuple(_convert(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(_list(value, where)))
    if origin is not None:
        return {_text(key, where): _convert(arguments[1], each, f"{where}.{key}") for key, each in _items(value, where)}
    if is_dataclass(hint):
        built: Any = build(cast("type[Any]", hint), value, where)
        return _plausible(built, where) if isinstance(built, Figure) else built
    if hint in (int, float):
        return _number(hint, value, where)
    return _text(value, where) if hint is str else _flag(value, where)


def _plausible(figure: Figure, where: str) -> Figure:
    for ending, (low, high) in _PLAUSIBLE.items():
        if where.endswith(ending):
            if not low <= figure.value <= high:
                raise BadProfile(
                    f"{where} is {figure.value:g}, which cannot be in the unit that its name tells "
                    f"({low:g} to {high:g}): was another unit meant?"
                )
            return figure
    return figure


def _number(kind: type[float], value: Any, where: str) -> float:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))):
        wanted = "a whole number" if kind is int else "a number; its unit is in its name"
        raise BadProfile(f"{where} must be {wanted}, not {quoted(value)}")
    if not 0 <= value <= 1e30:  # not a number is neither; whole numbers may be larger than any float
        raise BadProfile(f"{where} must be a finite number, 0 or more, not {quoted(value)}")
    return kind(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadProfile(f"{where} must be text, not {quoted(value)}")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise BadProfile(f"{where} must be true or false, not {quoted(value)}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadProfile(f"{where} must be a list, not {quoted(value)}")
    return value


def _items(value: Any, where: str) -> list[tuple[Any, Any]]:
    if not isinstance(value, dict):
        raise BadProfile(f"{where} must be a mapping, not {quoted(value)}")
    return list(value.items())


def _meant(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f": did you mean {close[0]}? Units are part of the names" if close else f": it knows {', '.join(known)}"
