"""Distinct values: each layer stores the image rows whose values stand out, and every step attends all of them.

Ours. What an image row can add to an answer is its value, weighted. Most rows of a picture have nearly the same value
(background: sky, road, an empty part of a screen), and the softmax spreads what they had over their like: leaving them
out changes little, whatever is asked. So rows are ranked by the distance of their value from the mean value of the
layer's image rows, and no attention is looked at: the rows that a long answer will read last count as much as those
that the question looks at first, which is where ranking by attention fails. The neighbours rank keys by their distance
from the mean key (KeyDiff, arXiv 2504.15364) or by their norm (arXiv 2406.11430).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...config import PromptShape, require
from .arithmetic import share, spread, top
from .base import Method, TierPeaks, Tiers, parameter
from .full import FullPolicy
from .policy import Kept, PromptLayer


@dataclass(frozen=True)
class Distinct(Method):
    """All stored rows are core."""

    secondary: float = parameter(25, "percent of image rows stored per layer", "S")

    name: ClassVar[str] = "distinct"
    summary: ClassVar[str] = "the image rows whose values stand out, all of them read on every step"
    source: ClassVar[str] = "avl-edge's own; near to KeyDiff (arXiv 2504.15364), which ranks by keys"

    def __post_init__(self) -> None:
        require(0 < self.secondary <= 100, f"secondary (S) must be above 0 and at most 100, not {self.secondary:g}")

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        text = prompt.prefix + prompt.suffix + steps
        return TierPeaks(layers * text, layers * share(prompt.images, self.secondary), 0)

    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG002
        text = prompt.prefix + prompt.suffix + steps
        return Tiers.of(prompt, steps, text, share(prompt.images, self.secondary))

    @property
    def shared_percent(self) -> float:
        return self.secondary

    def policy(self, prompt: PromptShape, layers: int) -> DistinctPolicy:  # noqa: ARG002
        return DistinctPolicy(share(prompt.images, self.secondary))

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[Distinct]:
        """The dial is S, from 100 percent down to 1."""
        for s in [fixed["secondary"]] if "secondary" in fixed else range(100, 0, -1):
            yield cls(**{**fixed, "secondary": s})


class DistinctPolicy(FullPolicy):
    """One request: full attention over fewer rows."""

    def __init__(self, stored: int) -> None:
        self._stored = stored

    @property
    def wants_distances(self) -> bool:
        return True

    def keep_prompt(self, view: PromptLayer) -> Kept:
        image = spread(top(view.distances[view.is_image], self._stored), view.is_image)
        return Kept(stored=~view.is_image | image, core=image)
