"""``avl-edge methods``"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ..kv.methods import METHODS, Method, Parameter
from .terminal import AsJson, Debug, readers_may_leave


def methods(as_json: AsJson = False, debug: Debug = False) -> None:  # noqa: ARG001
    """List the methods: what each keeps, where it is published, and its parameters with their defaults."""
    known = METHODS.values()
    with readers_may_leave():
        print(json.dumps([_document(each) for each in known]) if as_json else "\n\n".join(map(_text, known)))


def _document(method: type[Method]) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "source": method.source,
        "formats": asdict(method.formats),
        "parameters": [each._asdict() for each in method.parameters()],
    }


def _text(method: type[Method]) -> str:
    parameters = method.parameters()
    width = max((len(_setting(each)) for each in parameters), default=0)
    lines = [f"{method.name}: {method.summary}", f"  {method.source}"]
    lines += [f"  {_setting(each):<{width}}  {_meaning(each)}" for each in parameters]
    return "\n".join(lines)


def _setting(of: Parameter) -> str:
    return f"{of.name}={of.default:g}"


def _meaning(of: Parameter) -> str:
    return f"{of.symbol}: {of.help}" if of.symbol else of.help
