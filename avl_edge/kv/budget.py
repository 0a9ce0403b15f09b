"""From a byte budget to a setting that keeps it: pure arithmetic, before any work is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from ..config import Formats, KvShape, PromptShape, format_size
from ..errors import TooLarge
from .layout import Format, check, packing, page_bytes, smoothing_rows


class Peaks(Protocol):
    """Bounds of the rows of each tier, over all layers."""

    @property
    def text(self) -> int: ...
    @property
    def core(self) -> int: ...
    @property
    def secondary(self) -> int: ...


class Rows(NamedTuple):
    """Rows of each tier, over all layers."""

    text: int
    core: int
    secondary: int


class Counted(Protocol):
    """A method whose worst case is known before the first step (rows, over all layers)."""

    def peak_rows(self, prompt: PromptShape, steps: int, layers: int) -> int: ...

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> Peaks: ...


M = TypeVar("M", bound=Counted)


@dataclass(frozen=True)
class KvPlan(Generic[M]):
    """The setting picked for a request, the most pages of the pool that it will hold, and the ``tokens`` that it is
    planned for, those of the prompt and new ones."""

    method: M
    formats: Formats
    pages: int
    peak_bytes: int
    budget: int | None
    tokens: int


def peak_pages(method: Counted, formats: Formats, shape: KvShape, prompt: PromptShape, steps: int) -> int:
    """The most pages that a request holds at any time within ``steps`` decode steps after its prompt."""
    total, tiers = method.peak_rows(prompt, steps, shape.layers), method.peak_tiers(prompt, steps, shape.layers)
    used = {name for tier, name in formats.stored.by_tier().items() if total and getattr(tiers, tier)}
    beside = sum(Format(name).basis_rows for name in used) + smoothing_rows(formats)
    return _pages(tiers, total, shape.layers * beside if total else 0, formats, shape)


@dataclass(frozen=True)
class Held:
    """Image rows that a request holds after its prompt, and basis rows beside them, over all layers."""

    core: int
    secondary: int
    basis: int


def pages_from_now(
    method: Counted, formats: Formats, shape: KvShape, prompt: PromptShape, steps: int, held: Held
) -> int:
    """:func:`peak_pages` of what is still to come for a request whose rows stand in as few pages as hold them.

    After the prompt there are never more image rows than there are now.
    """
    tiers = Rows(method.peak_tiers(prompt, steps, shape.layers).text, held.core, held.secondary)
    beside = held.basis + shape.layers * smoothing_rows(formats)
    return _pages(tiers, method.peak_rows(prompt, steps, shape.layers), beside, formats, shape)


def _pages(tiers: Peaks, total: int, beside: int, formats: Formats, shape: KvShape) -> int:
    """Pages for as many rows in each tier, ``total`` of them at most, and for exact rows ``beside`` them: bases, and
    the smoothing of keys."""
    rows: Counter[str] = Counter()
    for tier, name in formats.stored.by_tier().items():
        rows[name] += getattr(tiers, tier)
    bounded = {name: min(count, total) for name, count in rows.items()}
    bounded["exact"] = bounded.get("exact", 0) + beside
    return sum(-(-count // packing(Format(name), shape).rows) for name, count in bounded.items())


def kv_plan(
    method: M, formats: Formats, shape: KvShape, prompt: PromptShape, steps: int, budget: int | None = None
) -> KvPlan[M]:
    """What one setting holds, whatever the ``budget``. Raises :class:`BadInput` for formats that the rows cannot take.

    ``steps`` is the number of decode steps after the prompt: each appends one row per layer.
    """
    check(formats, shape)
    pages = peak_pages(method, formats, shape, prompt, steps)
    return KvPlan(method, formats, pages, pages * page_bytes(shape), budget, prompt.length + steps)


def plan_after(
    method: M,
    formats: Formats,
    shape: KvShape,
    prompt: PromptShape,
    shared: int,
    steps: int,
    budget: int | None = None,
) -> KvPlan[M]:
    """:func:`kv_plan` of what a request adds whose first ``shared`` tokens, all images among them, are held already.

    Text between two images is among these and counts to a method's text budget, so that the request may hold fewer
    rows than planned; with one image the plan is exact.
    """
    text = method.peak_tiers(PromptShape(0, 0, prompt.suffix), steps, shape.layers).text
    pages = _pages(Rows(text, 0, 0), shape.layers * (prompt.length - shared + steps), 0, formats, shape)
    return KvPlan(method, formats, pages, pages * page_bytes(shape), budget, prompt.length + steps)


def fit(
    candidates: Iterable[tuple[M, Formats]], shape: KvShape, prompt: PromptShape, steps: int, budget: int | None
) -> KvPlan[M]:
    """The first of ``candidates`` (best answers first) whose peak stays within ``budget`` bytes.

    Raises :class:`TooLarge`, naming the smallest budget that would do, when none fits.
    """
    plans = (kv_plan(method, formats, shape, prompt, steps, budget) for method, formats in candidates)
    what = f"{prompt.length} prompt tokens and {steps + 1} new ones"
    return first_within(budget, plans, what, "raise --kv-budget, lower --max-new-tokens or let the method drop more")


class Promised(Protocol):
    """What holds at most so many bytes."""

    @property
    def peak_bytes(self) -> int: ...


P = TypeVar("P", bound=Promised)


def first_within(budget: int | None, found: Iterable[P], what: str, instead: str) -> P:
    """The first of ``found`` (the best first) within ``budget`` bytes; without a budget the first.

    Raises :class:`TooLarge` where there is none: with ``what`` did not fit, the smallest budget that would do, and
    what to do ``instead``.
    """
    smallest = 0
    for each in found:
        if budget is None or each.peak_bytes <= budget:
            return each
        smallest = min(smallest or each.peak_bytes, each.peak_bytes)
    assert budget is not None, "without a budget the first is taken"
    refusal = TooLarge(
        f"a KV budget of {format_size(budget)} ({budget} bytes) does not hold {what}: the smallest that would do is "
        f"{format_size(smallest)} ({smallest} bytes); {instead}"
    )
    refusal.smallest = smallest
    raise refusal
