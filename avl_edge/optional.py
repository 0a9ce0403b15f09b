"""Packages of the extras: the runtime works without them, so they are imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .errors import BadInput


def optional(module: str, purpose: str, extra: str = "eval") -> Any:
    """``module``, of the package's ``extra``; :class:`BadInput`, saying what ``purpose`` needs, where it is missing."""
    try:
        return import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise BadInput(f"{purpose} needs {package}: pip install 'avl-edge[{extra}]'") from None
