"""A-VL, adaptive attention for vision-language models (arXiv 2409.14846, AAAI 2025).

Image tokens are tiered per layer by the attention they receive: *core* rows are attended on every decode
step, *secondary* rows only on every K-th, which also picks the core anew, *minor* rows are never stored.
Text after the image is held to a budget of heavy hitters and the most recent rows (as in H2O).

Row sets are shared by all heads of a layer; the authors' public code evicts text per head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from ...config import PromptShape, require
from .arithmetic import (
    Mask,
    Scores,
    groups_of,
    heavy_and_recent,
    rounded_share,
    share,
    spread,
    top,
    top_of_each,
    top_of_groups,
    whole,
    with_column,
    without_lowest,
)
from .base import Method, TierPeaks, Tiers, parameter
from .policy import KeepsCore, Kept, PromptLayer, Prune, Queries, Settlement, Step, pruned


@dataclass(frozen=True)
class Avl(Method):
    """A-VL's symbols; percentages are of the image tokens of the prompt, of text rows for ``text_keep``.

    A refresh (``refresh``) picks the core anew. At least ``text_floor`` text rows are kept after the image, ``heavy``
    percent of which are heavy hitters and the others the most recent.

    ``prompt_mean`` 1 is ours, not the paper's: prefill ranks image tokens by their mean attention from all text after
    the image, instead of from the last token alone, which looks where the first word of the answer is and evicts what
    later words need. ``by_values`` 1 is ours too: prefill stores (and goes on beyond ``prune_layer`` with) the image
    tokens whose values stand out, whatever attention they get (see :mod:`avl_edge.kv.methods.distinct`); of those,
    attention picks the core. And so is ``drift``: beside every K-th step, the one after a step on which the core has
    lost so many percent of its attention (against the text's, since the last refresh, mean of the layers) refreshes as
    well. ``per_span`` 1 too: each picture of a prompt keeps its own share of rows, however little attention it gets
    beside the others; as published, the shares are of all image tokens together.
    """

    prefill_keep: float = parameter(90, "percent of image tokens beyond the early layers", "P")
    secondary: float = parameter(45, "percent of image rows stored per layer", "S")
    core: float = parameter(30, "percent of image rows read on an ordinary step", "C")
    refresh: int = parameter(3, "every K-th step reads all stored rows; 0: never", "K")
    text_keep: float = parameter(70, "percent of text rows kept after the image", "T")
    heavy: float = parameter(70, "percent of kept text that is heavy hitters, the rest recent")
    text_floor: int = parameter(20, "the fewest text rows kept after the image")
    prune_layer: int = parameter(2, "the last layer (0-based) that all image tokens reach", is_layer=True)
    prompt_mean: int = parameter(0, "1: rank by all text after the image; 0: by the last token")
    by_values: int = parameter(0, "1: store rows whose values stand out; 0: by attention")
    per_span: int = parameter(0, "1: each picture keeps its share; 0: shares are of all pictures together")
    drift: float = parameter(0, "percent of core attention lost that refreshes too; 0: never")

    name: ClassVar[str] = "avl"
    summary: ClassVar[str] = "image rows in tiers by the attention they get, text held to a budget"
    source: ClassVar[str] = "A-VL, arXiv 2409.14846, AAAI 2025"
    shared_with: ClassVar[str] = "avl with prefill_keep=100 and by_values=1, or secondary=100"

    def __post_init__(self) -> None:
        p, s, c = self.prefill_keep, self.secondary, self.core
        for symbol, name, value in (("P", "prefill_keep", p), ("S", "secondary", s), ("C", "core", c)):
            require(0 < value <= 100, f"{name} ({symbol}) must be above 0 and at most 100 percent, not {value:g}")
        require(0 < self.text_keep <= 100, f"text_keep (T) must be above 0 and at most 100, not {self.text_keep:g}")
        require(
            p >= s >= c,
            f"A-VL needs prefill_keep >= secondary >= core (P >= S >= C), but they are {p:g}, {s:g} and {c:g}",
        )
        require(
            whole(self.refresh) and self.refresh >= 0,
            f"refresh (K) must be a whole number of steps, 0 for never, not {self.refresh:g}",
        )
        require(0 <= self.heavy <= 100, f"heavy must be from 0 to 100 percent, not {self.heavy:g}")
        floor, layer = self.text_floor, self.prune_layer
        require(whole(floor) and floor >= 1, f"text_floor must be a whole number of rows from 1, not {floor:g}")
        require(self.prompt_mean in (0, 1), f"prompt_mean must be 0 or 1, not {self.prompt_mean:g}")
        require(self.by_values in (0, 1), f"by_values must be 0 or 1, not {self.by_values:g}")
        require(self.per_span in (0, 1), f"per_span must be 0 or 1, not {self.per_span:g}")
        require(0 <= self.drift <= 100, f"drift must be from 0 to 100 percent, not {self.drift:g}")
        require(whole(layer) and layer >= 0, f"prune_layer must be a whole number from 0, not {layer:g}")

    def text_budget(self, seen: int) -> int:
        """Text rows kept of the ``seen`` ones after the image (halves round to even)."""
        return min(seen, max(rounded_share(seen, self.text_keep), self.text_floor))

    def shares(self, prompt: PromptShape, percent: float) -> tuple[int, ...]:
        """``percent`` of the image tokens, or of each picture's."""
        lengths = [length for _, length in prompt.spans] if self.per_span else []
        return tuple(share(length, percent) for length in lengths or [prompt.images])

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        # Rows grow with every step, and a step's new row is there before the eviction that it causes.
        text = self.text_budget(prompt.suffix)
        if steps:
            text = max(text, self.text_budget(prompt.suffix + steps - 1) + 1)
        core, stored = sum(self.shares(prompt, self.core)), sum(self.shares(prompt, self.secondary))
        return TierPeaks(layers * (prompt.prefix + text), layers * core, layers * (stored - core))

    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG002
        text = prompt.prefix + self.text_budget(prompt.suffix + steps)
        return Tiers.of(
            prompt, steps, text, sum(self.shares(prompt, self.secondary)), sum(self.shares(prompt, self.core))
        )

    def tokens_in(self, prompt: PromptShape, layer: int) -> int:
        pruned = prompt.images - sum(self.shares(prompt, self.prefill_keep))
        return prompt.length - (pruned if layer > self.prune_layer else 0)

    @property
    def shared_percent(self) -> float | None:
        fixed = self.by_values and not self.per_span  # a session ranks the values of all its pictures together
        is_fixed = self.prefill_keep == 100 and (fixed or self.secondary == 100)
        return self.secondary if is_fixed else None

    def policy(self, prompt: PromptShape, layers: int) -> AvlPolicy:
        return AvlPolicy(self, prompt, layers)

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[Avl]:
        """One dial: S falls from 100 to 1; C is two thirds of S, as published, and T follows S down to 50."""
        if "secondary" in fixed:
            dial = [fixed["secondary"]]
        else:
            highest = int(fixed.get("prefill_keep", 100))
            dial = [s for s in range(highest, 0, -1) if s >= fixed.get("core", 0)]
        for s in dial or [cls.secondary]:
            picked = {
                "secondary": s,
                "core": max(1, s * 2 // 3),
                "prefill_keep": max(cls.prefill_keep, s),
                "text_keep": max(50, s),
            }
            yield cls(**{**picked, **fixed})  # type: ignore[arg-type]


class AvlPolicy(KeepsCore):
    """One request under A-VL.

    Keeps, layer by layer, the running sums of the text rows' attention (equally many in each), and the scores of the
    stored image rows when all of them were last scored: in prefill or at a refresh.
    """

    def __init__(self, settings: Avl, prompt: PromptShape, layers: int) -> None:
        self._settings = settings
        self._images = prompt.images
        # What image tokens are stored by, and go on by.
        attention: Literal["last", "total"] = "total" if settings.prompt_mean else "last"
        self._worth: Literal["last", "total", "distances"] = "distances" if settings.by_values else attention
        self._stored = settings.shares(prompt, settings.secondary)
        self._core = settings.shares(prompt, settings.core)
        self._survivors = settings.shares(prompt, settings.prefill_keep)
        # Where each picture begins that has shares of its own, and, by layer, which of these a stored row is of.
        self._starts = [start for start, _ in prompt.spans] if settings.per_span else []
        self._groups = [np.empty(0, dtype=np.int64)] * layers
        self._prefix, self._seen = prompt.prefix, prompt.suffix
        self._sums: Scores = np.empty((layers, 0))
        self._scores: list[Scores] = [np.empty(0)] * layers
        # The core's attention for one of text's at the last refresh, by layer.
        self._fresh = np.ones(layers)
        self._drifted_before = 0

    def prompt_queries(self, layer: int) -> Queries:  # noqa: ARG002
        return "suffix"

    @property
    def wants_distances(self) -> bool:
        return bool(self._settings.by_values)

    def keep_prompt(self, view: PromptLayer) -> Kept:
        scores = view.total if self._settings.prompt_mean else view.last
        image = pruned(view, self._prune(self._stored)) & view.is_image
        if self._starts:
            self._groups[view.layer] = groups_of(view.positions[image], self._starts)
        core = spread(self._best(view.layer, scores[image]), image)
        self._scores[view.layer] = scores[image]
        sums = view.total[view.is_suffix]
        (kept,) = self._keep_suffix(sums[None])
        if view.layer == 0:
            self._sums = np.empty((len(self._scores), np.count_nonzero(kept)))
        self._sums[view.layer] = sums[kept]
        prefix = ~view.is_image & ~view.is_suffix
        self._fresh[view.layer] = _odds(view.last[core], view.last[~view.is_image])
        return Kept(stored=prefix | image | spread(kept, view.is_suffix), core=core)

    def prunes(self, layer: int) -> Prune | None:
        if layer != self._settings.prune_layer or sum(self._survivors) >= self._images:
            return None
        return self._prune(self._survivors)

    def reads_secondary(self, step: int) -> bool:
        every = self._settings.refresh
        return (every > 0 and step % every == 0) or (step > 1 and step == self._drifted_before)

    def wants_scores(self, step: int) -> bool:
        return self._settings.text_keep < 100 or self._settings.drift > 0 or self.reads_secondary(step)

    def settle_step(self, step: Step) -> Settlement:
        core = None
        if self.reads_secondary(step.number):
            image, counts = step.scores.image, step.scores.image_counts
            core = self._cores(image, counts)
            self._scores = [row[:count] for row, count in zip(image, counts.tolist(), strict=True)]
        if self._settings.drift:
            self._watch(step, core)
        return Settlement(core, self._settle_text(step) if self._settings.text_keep < 100 else None)

    def evictable(self, layer: int, core: Mask) -> int:  # noqa: ARG002
        return int((~core).sum())

    def evict(self, layer: int, core: Mask, count: int) -> Mask:
        keep = without_lowest(self._scores[layer], core, count)
        self._scores[layer] = self._scores[layer][keep]
        if self._starts:
            self._groups[layer] = self._groups[layer][keep]
        return keep

    def _prune(self, counts: tuple[int, ...]) -> Prune:
        each = tuple(zip(self._starts, counts, strict=True)) if self._starts else ()
        return Prune(sum(counts), self._worth, each)

    def _best(self, layer: int, scores: Scores) -> Mask:
        """The core of a layer's stored image rows ``[n]``."""
        if self._starts:
            return top_of_groups(scores, self._groups[layer], self._core)
        return top(scores, self._core[0])

    def _cores(self, image: Scores, counts: npt.NDArray[np.int32]) -> Mask:
        """That of all layers ``[L, n]``, which have so many rows each."""
        if not self._starts:
            return top_of_each(image, counts, self._core[0])
        mask = np.zeros(image.shape, dtype=np.bool_)
        for layer, count in enumerate(counts.tolist()):
            mask[layer, :count] = self._best(layer, image[layer, :count])
        return mask

    def _watch(self, step: Step, core: Mask | None) -> None:
        """Note how much of the attention the core has, and whether the next step refreshes."""
        odds = _odds(step.scores.image if core is None else np.where(core, step.scores.image, 0), step.scores.text)
        if core is not None:
            self._fresh = odds
        left = np.minimum(odds / self._fresh, 1).mean()
        if 100 * (1 - left) >= self._settings.drift:
            self._drifted_before = step.number + 1

    def _settle_text(self, step: Step) -> Mask | None:
        self._seen += 1
        self._sums = with_column(self._sums, 0)
        self._sums += step.scores.text[:, self._prefix :]
        layers, count = self._sums.shape
        if count <= self._settings.text_budget(self._seen):
            return None
        text = np.ones((layers, self._prefix + count), dtype=np.bool_)
        text[:, self._prefix :] = keep = self._keep_suffix(self._sums)
        self._sums = self._sums[keep].reshape(layers, -1)
        return text

    def _keep_suffix(self, sums: Scores) -> Mask:
        """Heavy hitters by running sum, and the most recent rows: a mask over the text rows after the image, ``[L, n]``
        as their ``sums``."""
        return heavy_and_recent(sums, self._settings.text_budget(self._seen), self._settings.heavy)


def _odds(image: Scores, text: Scores) -> npt.NDArray[np.float64]:
    """Attention to image rows for one of attention to text rows, along the last axis."""
    tiny = np.finfo(np.float32).tiny
    return np.asarray((image.sum(-1, dtype=np.float64) + tiny) / (text.sum(-1, dtype=np.float64) + tiny))
