"""Coarse keys: every step scans a coarse form of all stored keys and attends the best rows exactly.

Ours; the neighbours are Quest (arXiv 2406.10774: bounds per page) and ShadowKV (arXiv 2410.21465: low-rank keys). The
attention over a dense picture moves at every step, so a core that was picked some steps ago misses what the next word
needs. Packed keys make a scan cheap: of an int8 key the high nibbles alone, of an int4 key all of it. The core is
picked anew at every step and layer, as a *nucleus*: rows in order of their coarse weight until they hold a share of it,
so that a diffuse layer reads many rows and a peaked one few, under a cap that keeps the promise of a time.

Which image rows are stored at all is decided in prefill by their values, as in :mod:`avl_edge.kv.methods.distinct`;
text is never evicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...config import Formats, PromptShape, require
from .arithmetic import Mask, Scores, share, spread, top, without_lowest
from .base import Method, TierPeaks, Tiers, parameter
from .policy import Kept, PromptLayer, Queries, Settlement, Step, Unpruned


@dataclass(frozen=True)
class Coarse(Method):
    """A step attends at most ``core`` percent of the image's rows; fewer, when these hold ``mass`` percent of the
    image's coarse attention (100: always C).

    With ``by_mass`` layers share what they store, S of all their image rows, by one threshold: each keeps its best rows
    up to the same share of its rows' squared distances, so that a layer in which few rows stand out stores few.
    """

    secondary: float = parameter(100, "percent of image rows stored per layer", "S")
    core: float = parameter(40, "percent of image rows read on a step, at most", "C")
    mass: float = parameter(95, "percent of coarse attention that is enough, up to C")
    by_mass: int = parameter(0, "1: layers share the stored rows by one threshold; 0: S of each layer")

    name: ClassVar[str] = "coarse"
    summary: ClassVar[str] = "every step scans a coarse form of all stored keys and reads the best rows exactly"
    source: ClassVar[str] = "avl-edge's own; near to Quest (arXiv 2406.10774) and ShadowKV (arXiv 2410.21465)"
    shared_with: ClassVar[str] = "coarse with by_mass=0"

    def __post_init__(self) -> None:
        for name in ("secondary", "core", "mass"):
            value = getattr(self, name)
            require(0 < value <= 100, f"{name} must be above 0 and at most 100 percent, not {value:g}")
        require(self.by_mass in (0, 1), f"by_mass must be 0 or 1, not {self.by_mass:g}")

    @classmethod
    def check_formats(cls, formats: Formats) -> None:
        require(
            formats.core == formats.secondary,
            "coarse picks its core anew at every step: give core and secondary rows the same format",
        )
        require(
            not formats.core.startswith("lowrank"),
            "coarse scans the keys of stored rows, which low-rank ones have to be rebuilt for: choose int8 or int4",
        )

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        # Which of the stored rows are core changes with every step: all of them count as such.
        text = prompt.prefix + prompt.suffix + steps
        return TierPeaks(layers * text, layers * share(prompt.images, self.secondary), 0)

    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG002
        """At most C of the image rows are read on a step; a nucleus may be smaller, as only scores can tell."""
        text = prompt.prefix + prompt.suffix + steps
        stored = share(prompt.images, self.secondary)
        return Tiers.of(prompt, steps, text, stored, min(stored, share(prompt.images, self.core)))

    @property
    def shared_percent(self) -> float | None:
        return None if self.by_mass else self.secondary

    def policy(self, prompt: PromptShape, layers: int) -> CoarsePolicy:
        return CoarsePolicy(self, prompt, layers)

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[Coarse]:
        """The dial is S, from 100 percent down to 1."""
        for s in [fixed["secondary"]] if "secondary" in fixed else range(100, 0, -1):
            yield cls(**{**fixed, "secondary": s})  # type: ignore[arg-type]


class CoarsePolicy(Unpruned):
    """One request. Nothing is remembered from step to step, but how far the values of the stored image rows lie from
    the mean."""

    def __init__(self, settings: Coarse, prompt: PromptShape, layers: int) -> None:
        self._stored = share(prompt.images, settings.secondary)
        self._core = share(prompt.images, settings.core)
        self._mass = settings.mass / 100
        self._distances: list[Scores] = [np.empty(0)] * layers
        # Under one threshold: all rows that may be stored, and for each what better ones of its layer have together.
        self._all = self._stored * layers if settings.by_mass else None
        self._before: list[Scores] = []

    def prompt_queries(self, layer: int) -> Queries:  # noqa: ARG002
        return "none"

    @property
    def wants_distances(self) -> bool:
        return True

    def keep_prompt(self, view: PromptLayer) -> Kept:
        if self._all is not None:
            return self._keep_by_mass(view, self._all)
        image = spread(top(view.distances[view.is_image], self._stored), view.is_image)
        self._distances[view.layer] = view.distances[image]
        return Kept(stored=~view.is_image | image, core=image)

    def _keep_by_mass(self, view: PromptLayer, count: int) -> Kept:
        """The best ``count`` rows of all layers so far: what a later layer displaces could not have stayed anyway."""
        far = view.distances[view.is_image]
        order = np.argsort(-far, kind="stable")
        held = np.cumsum(far[order], dtype=np.float64) / max(far.sum(dtype=np.float64), np.finfo(np.float64).tiny)
        before = np.empty(len(far))
        before[order] = np.append(0, held[:-1])
        self._before.append(before)
        self._distances[view.layer] = far
        ends = np.cumsum([len(each) for each in self._before])[:-1]
        masks = np.split(top(-np.concatenate(self._before), count), ends)
        for layer, mask in enumerate(masks):
            self._before[layer], self._distances[layer] = self._before[layer][mask], self._distances[layer][mask]
        image = spread(masks[-1], view.is_image)
        earlier = {layer: mask for layer, mask in enumerate(masks[:-1]) if not mask.all()}
        return Kept(stored=~view.is_image | image, core=image, earlier=earlier)

    def picks_core(self, step: int) -> bool:  # noqa: ARG002
        return True

    def pick_core(self, weights: Scores) -> Mask:
        order = np.argsort(-weights, kind="stable")
        needed = len(order)
        if self._mass < 1 and needed:
            held = np.cumsum(weights[order], dtype=np.float64)
            needed = int(np.searchsorted(held, self._mass * held[-1])) + 1
        core = np.zeros(len(weights), dtype=np.bool_)
        core[order[: min(needed, self._core)]] = True
        return core

    def nucleus(self) -> tuple[float, int]:
        return self._mass, self._core

    def reads_secondary(self, step: int) -> bool:  # noqa: ARG002
        return False

    def wants_scores(self, step: int) -> bool:  # noqa: ARG002
        return False

    def settle_step(self, step: Step) -> Settlement:  # noqa: ARG002
        return Settlement()

    def evictable(self, layer: int, core: Mask) -> int:  # noqa: ARG002
        """Down to C: so many rows a step may attend."""
        return max(0, min(int((~core).sum()), len(core) - self._core))

    def evict(self, layer: int, core: Mask, count: int) -> Mask:
        keep = without_lowest(self._distances[layer], core, count)
        self._distances[layer] = self._distances[layer][keep]
        return keep
