"""H2O, the heavy-hitter oracle (arXiv 2306.14048, NeurIPS 2023; public code FMInference/H2O).

Every row's attention is summed over all queries so far: the prompt's, then one per step. A layer holds a budget of
rows: those with the highest sums (heavy hitters) and the most recent ones. All rows are alike: images, the text after
them and the system prompt; an evicted row's sum is forgotten.

Where paper and code leave room: the paper's cache has a fixed size, and the code that generates takes it from the
prompt's length, so that is what ``budget`` counts; the code that scores given text takes it from the whole sequence,
which is ``grow``. The code rounds each half down by itself; here the total is rounded down and the recent rows take
what the heavy ones leave, so that 100 % is all of them. A layer is settled after its attention, so a step reads the
budget and its own row. Row sets are shared by all heads of a layer, by the mean of their sums; the paper evicts per
head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...config import PromptShape, require
from .arithmetic import Mask, Scores, heavy_and_recent, share, with_column
from .base import Method, TierPeaks, Tiers, images_among, mixed_peaks, parameter
from .policy import KeepsCore, Kept, PromptLayer, Queries, RowOrder, Settlement, Step


@dataclass(frozen=True)
class H2O(Method):
    """A layer holds at least one row. With ``grow`` the budget grows with the answer."""

    budget: float = parameter(50, "rows held per layer, in percent of the prompt's")
    heavy: float = parameter(50, "percent of them that are heavy hitters, the rest recent")
    grow: int = parameter(0, "1: the budget is of all rows so far; 0: of the prompt's")

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "the rows with most attention so far and the most recent ones, within a budget"
    source: ClassVar[str] = "H2O, arXiv 2306.14048, NeurIPS 2023"

    def __post_init__(self) -> None:
        require(0 < self.budget <= 100, f"budget must be above 0 and at most 100 percent, not {self.budget:g}")
        require(0 <= self.heavy <= 100, f"heavy must be from 0 to 100 percent, not {self.heavy:g}")
        require(self.grow in (0, 1), f"grow must be 0 (a fixed budget) or 1 (it grows), not {self.grow:g}")

    def rows(self, prompt: int, generated: int) -> int:
        """Rows that a layer holds once a prompt of that length and ``generated`` tokens have been through it."""
        return max(share(prompt + generated if self.grow else prompt, self.budget), 1)

    def peak_rows(self, prompt: PromptShape, steps: int, layers: int) -> int:
        # A step's new row is there before the eviction that it causes.
        held = self.rows(prompt.length, steps - 1) + 1 if steps else self.rows(prompt.length, 0)
        return layers * held

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        return mixed_peaks(self.peak_rows(prompt, steps, layers), prompt, steps, layers)

    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG002
        """The sum is exact; which of the heavy hitters are image rows, only scores can tell: in proportion, here."""
        seen = prompt.length + steps
        held = min(self.rows(prompt.length, steps), seen)
        heavy = share(held, self.heavy) if held < seen else 0
        older = seen - (held - heavy)
        images = images_among(prompt, older, seen) + heavy * images_among(prompt, 0, older) // max(older, 1)
        return Tiers.of(prompt, steps, held - images, images)

    def policy(self, prompt: PromptShape, layers: int) -> H2OPolicy:
        return H2OPolicy(self, prompt, layers)

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[H2O]:
        """The dial is the budget, from 100 percent down to 1; before it, where the answer's rows fit too, all rows."""
        if not {"budget", "grow"} & fixed.keys():
            yield cls(**{**fixed, "budget": 100, "grow": 1})  # type: ignore[arg-type]
        for budget in [fixed["budget"]] if "budget" in fixed else range(100, 0, -1):
            yield cls(**{**fixed, "budget": budget})  # type: ignore[arg-type]


class H2OPolicy(KeepsCore):
    """One request under H2O. Keeps the running sums of the held rows' attention, ``[L, rows]``."""

    def __init__(self, settings: H2O, prompt: PromptShape, layers: int) -> None:
        self._settings = settings
        self._length = prompt.length
        self._order = RowOrder(layers)
        self._sums: Scores = np.empty((layers, 0))

    def prompt_queries(self, layer: int) -> Queries:  # noqa: ARG002
        return "all"

    def keep_prompt(self, view: PromptLayer) -> Kept:
        (keep,) = self._select(view.total[None], generated=0)
        if view.layer == 0:
            self._sums = np.empty((len(self._sums), np.count_nonzero(keep)))
        self._sums[view.layer] = view.total[keep]
        return self._order.store(view, keep)

    def reads_secondary(self, step: int) -> bool:  # noqa: ARG002
        return False

    def wants_scores(self, step: int) -> bool:  # noqa: ARG002
        return True

    def settle_step(self, step: Step) -> Settlement:
        self._order.append()
        sums = with_column(self._sums, 0) + self._order.scores(step)
        keep = self._select(sums, generated=step.number)
        self._sums = sums[keep].reshape(len(sums), -1)
        return self._order.keep(keep)

    def _select(self, sums: Scores, generated: int) -> Mask:
        """The rows that stay of those of each layer, by the sums ``[L, rows]`` of all in order of position."""
        return heavy_and_recent(sums, self._settings.rows(self._length, generated), self._settings.heavy)
