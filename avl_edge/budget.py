"""From a byte budget to a method that keeps it: pure arithmetic, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .config import KvShape, PromptShape, format_size
from .errors import DoesNotFit


class Counted(Protocol):
    """A method whose worst case is known before the first step (rows, over all layers)."""

    def peak_rows(self, prompt: PromptShape, steps: int, layers: int) -> int: ...


M = TypeVar("M", bound=Counted)


@dataclass(frozen=True)
class KvPlan(Generic[M]):
    """The method picked for a request and the most that it will hold."""

    method: M
    peak_rows: int
    peak_bytes: int
    budget: int | None


def fit(candidates: Iterable[M], shape: KvShape, prompt: PromptShape, steps: int, budget: int | None) -> KvPlan[M]:
    """The first of ``candidates`` (best answers first) whose peak stays within ``budget`` bytes.

    ``steps`` is the number of decode steps after the prompt: each appends one row per layer.
    Raises :class:`DoesNotFit`, naming the smallest budget that would do, when none fits.
    """
    smallest = 0
    for method in candidates:
        rows = method.peak_rows(prompt, steps, shape.layers)
        peak = rows * shape.row_bytes
        if budget is None or peak <= budget:
            return KvPlan(method, rows, peak, budget)
        smallest = min(smallest or peak, peak)
    assert budget is not None, "without a budget the first candidate is taken"
    raise DoesNotFit(
        f"a KV budget of {format_size(budget)} ({budget} bytes) does not hold {prompt.length} prompt tokens and "
        f"{steps + 1} new ones: the smallest that would do is {format_size(smallest)} ({smallest} bytes); "
        f"raise --kv-budget, lower --max-new-tokens or let the method drop more"
    )
