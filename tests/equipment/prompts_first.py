"""A schedule under which requests that were submitted together get their tokens together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from avl_edge.serving.requests import Running
from avl_edge.serving.schedule_policy import Advance, Decode


class PromptsFirst:
    """Whole prompts, in the order of their requests, before the next token of anybody."""

    def order(self, waiting: Sequence[Running], now: float) -> Sequence[Running]:  # noqa: ARG002
        return waiting

    def choose(
        self,
        waiting: Sequence[Running],
        running: Sequence[Running],
        now: float,  # noqa: ARG002
    ) -> Advance | Decode | None:
        if waiting:
            return Advance(waiting[0], sys.maxsize)
        return Decode(running) if running else None


STEPPED: dict[str, Any] = {"threaded": False, "schedule": PromptsFirst()}
"""For a runtime that is stepped by hand, and whose batches are those of the requests that were submitted together."""
