"""A backend of which one stage does something else: fails, or looks around first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from avl_edge.kv.shared_prefix import SharedPrefixCache

STAGES = ["prefix", "prompt", "decode"]
"""The prompt of an image session, that of a request, a decode step."""


def before(patch: pytest.MonkeyPatch, backend: Any, stage: str, do: Callable[[], object]) -> None:
    """Call ``do`` before each time that ``backend`` begins a stage."""
    name = "decode" if stage == "decode" else "begin_prefill"
    function = getattr(backend, name)

    def first(*arguments: Any, **named: Any) -> Any:
        if stage == "decode" or isinstance(arguments[2], SharedPrefixCache) == (stage == "prefix"):
            do()
        return function(*arguments, **named)

    patch.setattr(backend, name, first)
