"""Several prompts of ``avl-edge run``: one image session, and a question for each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from ..config import Formats, Options, format_size
from ..errors import BadInput, TooLarge
from ..kv.budget import first_within
from ..kv.methods import METHODS, Distinct
from ..model.images import Source
from ..model.prompt import Message, shown_in
from ..request import ImageSessionStats, Result
from ..serving.image_session import ImageSession
from ..serving.requests import Request
from ..serving.runtime import Runtime

_SHARES = (50, 25, 12, 6, 3, 1)
"""Percent of a picture's rows that are tried to keep a budget."""


@dataclass(frozen=True)
class Several:
    """An image session and the questions about it, checked and planned."""

    prompts: Sequence[str]
    session: ImageSession
    requests: Sequence[Request]

    @property
    def peak_bytes(self) -> int:
        """What the picture and all questions hold at most, together."""
        return self.session.peak_bytes + sum(request.plan.peak_bytes for request in self.requests)

    @property
    def prompt_bytes(self) -> int:
        """What the longest prompt takes while it runs."""
        return max(request.workspace.prompt_bytes for request in self.requests)

    def answer(self, runtime: Runtime, *, quiet: bool) -> list[Result]:
        """Decode all questions together; unless ``quiet``, print each with its answer, in the order of the prompts."""
        generations = [runtime.submit(request) for request in self.requests]
        results = []
        for prompt, generation in zip(self.prompts, generations, strict=True):
            results.append(generation.result())
            if not quiet:
                print(f"{prompt}\n{results[-1].text}", flush=True)
        return results

    def document(self, results: Sequence[Result]) -> dict[str, Any]:
        """What ``--json`` prints of the answers."""
        answers = [{"prompt": prompt, **each.to_dict()} for prompt, each in zip(self.prompts, results, strict=True)]
        return {"session": asdict(self.session.stats), "answers": answers}


def plan(
    runtime: Runtime,
    images: Sequence[Source],
    prompts: Sequence[str],
    options: Options,
    before: Sequence[Message] = (),
) -> Several:
    """The picture's rows and all questions', in the first settings in which ``options``' budget, or without one what
    the memory of the process leaves, holds them together: every row, then packed, then fewer of them.

    Raises :class:`BadInput` for methods that share no rows, :class:`TooLarge` beyond that.
    """
    if not images and not shown_in(before):
        raise BadInput("several prompts share a picture: give --image, or ask them one at a time")

    bounded = options.kv_budget is not None or runtime.memory().limit is not None

    def every() -> Iterator[Several]:
        for each in _settings(runtime, options, bounded=bounded):
            session = runtime.open_images(images, each, before)
            yield Several(prompts, session, [session.prepare(prompt) for prompt in prompts])

    under = "" if options.method is None else f" under {options.method}"
    what = f"the picture and {len(prompts)} questions about it{under}"
    instead = "raise --kv-budget, lower --max-new-tokens or ask fewer at a time"
    variants = every()
    first = next(variants)
    budget = options.kv_budget_bytes
    if budget is None:
        budget = runtime.kv_bytes_left(first.prompt_bytes)
    try:
        found = first_within(budget, chain([first], variants), what, instead)
    except TooLarge as error:
        if options.kv_budget is None:
            runtime.require_memory(first.prompt_bytes, error.smallest or 0, what)
        raise
    runtime.require_memory(found.prompt_bytes, found.peak_bytes, what)
    return found


def _settings(runtime: Runtime, options: Options, *, bounded: bool) -> Iterator[Options]:
    """As asked for; to keep a bound, packed as far as nobody said how, and then with fewer rows as far as nobody said
    how many."""
    options = replace(options, kv_budget=None)
    yield options
    if not bounded or options.preset:
        return
    packed: list[Formats] = [] if options.formats else runtime.planner.packed
    for formats in packed:
        options = replace(options, formats=formats)
        yield options
    method, most = options.method or Distinct.name, 100.0
    known = {each.name: each.default for each in METHODS[method].parameters()}
    if options.method:
        most = options.parameters.get("secondary", known.get("secondary", 0))
    for share in _SHARES if "secondary" in known and "secondary" not in options.parameters else ():
        if share < most:
            yield replace(options, method=method, parameters={**options.parameters, "secondary": share})


def say_plan(several: Several, budget: int) -> None:
    """One line on stderr: what was picked for a budget."""
    plan = several.requests[0].plan
    share = several.session.share
    rows = plan.formats.core if share == 100 else f"{plan.formats.core} and {share:g} % of the picture's"
    print(
        f"avl-edge: the picture and {len(several.requests)} questions, rows {rows}, hold at most "
        f"{format_size(several.peak_bytes)} of the {format_size(budget)} budget",
        file=sys.stderr,
    )


def describe(stats: ImageSessionStats) -> str:
    """A line for ``--stats``."""
    return (
        f"picture: {stats.tokens} tokens ({stats.image_tokens} image), {format_size(stats.bytes_stored)} of rows held "
        f"once; encode / prefill {stats.encode_ms:.0f} / {stats.prefill_ms:.0f} ms"
    )
