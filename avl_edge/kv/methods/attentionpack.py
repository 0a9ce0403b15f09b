"""AttentionPack: all image rows stay, low-rank, the important ones read at full rank (arXiv 2603.23914, CVPR 2026).

Nothing is evicted. Image rows are low-rank (:mod:`avl_edge.attention.lowrank`), which the formats of the tiers say: by
default R is 64, and rows beside the most important ones are read by the first R / 4 of their coefficients (the paper's
attention-aware partial decompression). A row's importance is a moving average of the mean attention that it received.

Text rows stay as their own format says. The paper compacts a grown tail of text again once it is long: an answer here
is shorter than the basis that its rows would need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...config import Formats, PromptShape, require
from .arithmetic import Scores, share, top
from .base import Method, TierPeaks, Tiers, parameter
from .policy import KeepsCore, Kept, PromptLayer, Queries, Settlement, Step


@dataclass(frozen=True)
class AttentionPack(Method):
    """``decay`` is of the moving average: the rest is the attention that a row receives on the step."""

    core: float = parameter(25, "percent of image rows read at full rank", "r1")
    decay: float = parameter(90, "percent of a row's importance that a step keeps")

    name: ClassVar[str] = "attentionpack"
    summary: ClassVar[str] = "all image rows in low rank, the important ones read at full rank"
    source: ClassVar[str] = "AttentionPack, arXiv 2603.23914, CVPR 2026"
    formats: ClassVar[Formats] = Formats("exact", "lowrank:64", "lowrank:64@16")

    def __post_init__(self) -> None:
        require(0 <= self.core <= 100, f"core (r1) must be from 0 to 100 percent, not {self.core:g}")
        require(0 <= self.decay < 100, f"decay must be at least 0 and below 100 percent, not {self.decay:g}")

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        core = share(prompt.images, self.core)
        text = prompt.prefix + prompt.suffix + steps
        return TierPeaks(layers * text, layers * core, layers * (prompt.images - core))

    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG002
        text = prompt.prefix + prompt.suffix + steps
        return Tiers.of(prompt, steps, text, prompt.images, share(prompt.images, self.core))

    def policy(self, prompt: PromptShape, layers: int) -> AttentionPackPolicy:
        return AttentionPackPolicy(self, prompt, layers)

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[AttentionPack]:
        """No dial: bytes depend on the formats alone."""
        yield cls(**fixed)


class AttentionPackPolicy(KeepsCore):
    """One request: the importance of the image rows, ``[L, n]``."""

    def __init__(self, settings: AttentionPack, prompt: PromptShape, layers: int) -> None:
        self._core = share(prompt.images, settings.core)
        self._decay = settings.decay / 100
        self._importance: Scores = np.empty((layers, 0))

    def prompt_queries(self, layer: int) -> Queries:  # noqa: ARG002
        return "suffix"

    def keep_prompt(self, view: PromptLayer) -> Kept:
        queries = max(int(view.is_suffix.sum()), 1)
        importance = view.total[view.is_image] / queries
        if view.layer == 0:
            self._importance = np.empty((len(self._importance), len(importance)), importance.dtype)
        self._importance[view.layer] = importance
        core = np.zeros(len(view.is_image), dtype=np.bool_)
        core[view.is_image] = top(importance, self._core)
        return Kept(stored=np.ones(len(view.is_image), dtype=np.bool_), core=core)

    def reads_secondary(self, step: int) -> bool:  # noqa: ARG002
        return True

    def wants_scores(self, step: int) -> bool:  # noqa: ARG002
        return True

    def settle_step(self, step: Step) -> Settlement:
        self._importance = self._decay * self._importance + (1 - self._decay) * step.scores.image
        return Settlement(core=top(self._importance, self._core))
