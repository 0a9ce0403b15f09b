"""StreamingLLM (arXiv 2309.17453, ICLR 2024; public code mit-han-lab/streaming-llm): attention sinks and a window.

A layer holds the first rows of the sequence (the sinks) and the most recent ones, whatever they are: image, text or
system prompt. The window is counted in rows, the sinks not among them. The published settings are 4 + 1020 rows in the
paper's first table and 4 + 2000 in the code's chat example.

Where this differs: the prompt is attended in full and cut when a layer is done with it, as the code does with a prompt
given in one piece; a step reads sinks, window and its own row before the oldest row of the window leaves. Keys keep
their original positions, as everywhere in this runtime; the paper counts positions within the cache, which matters
for texts beyond the length that a model was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...config import PromptShape, require
from .arithmetic import Mask, recent
from .base import Method, TierPeaks, Tiers, images_among, mixed_peaks, parameter
from .policy import KeepsCore, Kept, PromptLayer, Queries, RowOrder, Settlement, Step

_WIDEST = 2**20
_FINEST = 128


@dataclass(frozen=True)
class Streaming(Method):
    """The defaults are those of the paper's first table."""

    sinks: int = parameter(4, "rows at the start of the sequence that always stay")
    window: int = parameter(1020, "most recent rows held beside them")

    name: ClassVar[str] = "streaming"
    summary: ClassVar[str] = "the first rows of the sequence and a window of the most recent ones"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453, ICLR 2024"

    def __post_init__(self) -> None:
        for name, value, least in (("sinks", self.sinks, 0), ("window", self.window, 1)):
            require(
                value >= least and float(value).is_integer(),
                f"{name} must be a whole number of rows, at least {least}, not {value:g}",
            )

    def peak_rows(self, prompt: PromptShape, steps: int, layers: int) -> int:
        # A step's new row is there before the eviction that it causes.
        held = int(self.sinks) + int(self.window) + (1 if steps else 0)
        return layers * min(held, prompt.length + steps)

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        return mixed_peaks(self.peak_rows(prompt, steps, layers), prompt, steps, layers)

    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG002
        seen = prompt.length + steps
        sinks = min(int(self.sinks), seen)
        begin = max(sinks, seen - int(self.window))
        images = images_among(prompt, 0, sinks) + images_among(prompt, begin, seen)
        return Tiers.of(prompt, steps, sinks + seen - begin - images, images)

    def policy(self, prompt: PromptShape, layers: int) -> StreamingPolicy:  # noqa: ARG002
        return StreamingPolicy(self, layers)

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[Streaming]:
        """The dial is the window, from more than any context down to 1 row, in steps of under one percent."""
        window = fixed.get("window", _WIDEST)
        while window >= 1:
            yield cls(**{**fixed, "window": window})  # type: ignore[arg-type]
            window = 0 if "window" in fixed else window - max(window // _FINEST, 1)


class StreamingPolicy(KeepsCore):
    """One request under StreamingLLM. Looks at positions alone, never at scores."""

    def __init__(self, settings: Streaming, layers: int) -> None:
        self._sinks, self._window = int(settings.sinks), int(settings.window)
        self._order = RowOrder(layers)

    def prompt_queries(self, layer: int) -> Queries:  # noqa: ARG002
        return "none"

    def keep_prompt(self, view: PromptLayer) -> Kept:
        return self._order.store(view, self._select(len(view.positions)))

    def reads_secondary(self, step: int) -> bool:  # noqa: ARG002
        return False

    def wants_scores(self, step: int) -> bool:  # noqa: ARG002
        return False

    def settle_step(self, step: Step) -> Settlement:
        keep = self._select(self._order.append())
        return self._order.keep(np.broadcast_to(keep, (len(step.core), len(keep))))

    def _select(self, count: int) -> Mask:
        keep = recent(count, self._window)
        keep[: self._sinks] = True
        return keep
