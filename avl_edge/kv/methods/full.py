"""Full attention: every row, every step. The reference that all other methods are measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...config import PromptShape
from .base import Method, TierPeaks, Tiers
from .policy import KeepsCore, Kept, PromptLayer, Queries, Settlement, Step


@dataclass(frozen=True)
class Full(Method):
    """No parameters."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "every row, every step: what the others are measured against"
    source: ClassVar[str] = "the model's own attention"

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        return TierPeaks(layers * (prompt.prefix + prompt.suffix + steps), layers * prompt.images, 0)

    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG002
        return Tiers.of(prompt, steps, prompt.prefix + prompt.suffix + steps, prompt.images)

    @property
    def shared_percent(self) -> float:
        return 100

    def policy(self, prompt: PromptShape, layers: int) -> FullPolicy:  # noqa: ARG002
        return FullPolicy()

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[Full]:
        yield cls(**fixed)


class FullPolicy(KeepsCore):
    """Stores all image rows as core and settles nothing."""

    def prompt_queries(self, layer: int) -> Queries:  # noqa: ARG002
        return "none"

    def keep_prompt(self, view: PromptLayer) -> Kept:
        return Kept(stored=np.ones_like(view.is_image), core=view.is_image)

    def reads_secondary(self, step: int) -> bool:  # noqa: ARG002
        return False

    def wants_scores(self, step: int) -> bool:  # noqa: ARG002
        return False

    def settle_step(self, step: Step) -> Settlement:  # noqa: ARG002
        return Settlement()
