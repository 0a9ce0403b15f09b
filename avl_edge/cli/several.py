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
from ..model.images import Source
from ..model.prompt import Message, shown_in
from ..request import ImageSessionStats, Result
from ..serving.image_session import ImageSession
from ..serving.requests import Request
from ..serving.runtime import Runtime


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
    """The picture's rows and all questions', in the first formats in which ``options``' budget, or without one what the
    memory of the process leaves, holds them together.

    Raises :class:`BadInput` for methods that share no rows, :class:`TooLarge` beyond that.
    """
    if not images and not shown_in(before):
        raise BadInput("several prompts share a picture: give --image, or ask them one at a time")

    bounded = options.kv_budget is not None or runtime.memory().limit is not None

    def every() -> Iterator[Several]:
        for formats in _formats(runtime, options, bounded=bounded):
            session = runtime.open_images(images, replace(options, kv_budget=None, formats=formats), before)
            yield Several(prompts, session, [session.prepare(prompt) for prompt in prompts])

    rows = "with every image row stored" if options.method is None else f"under {options.method}"
    what = f"the picture and {len(prompts)} questions about it, {rows}"
    instead = "raise --kv-budget, store fewer rows (--method distinct), lower --max-new-tokens or ask fewer at a time"
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


def _formats(runtime: Runtime, options: Options, *, bounded: bool) -> Iterator[Formats | None]:
    yield options.formats
    if bounded and options.formats is None:
        yield from runtime.planner.packed


def say_plan(several: Several, budget: int) -> None:
    """One line on stderr: what was picked for a budget."""
    packed = several.requests[0].plan.formats.core
    print(
        f"avl-edge: the picture and {len(several.requests)} questions, rows {packed}, hold at most "
        f"{format_size(several.peak_bytes)} of the {format_size(budget)} budget",
        file=sys.stderr,
    )


def describe(stats: ImageSessionStats) -> str:
    """A line for ``--stats``."""
    return (
        f"picture: {stats.tokens} tokens ({stats.image_tokens} image), {format_size(stats.bytes_stored)} of rows held "
        f"once; encode / prefill {stats.encode_ms:.0f} / {stats.prefill_ms:.0f} ms"
    )
