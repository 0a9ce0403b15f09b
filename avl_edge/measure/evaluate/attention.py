"""What full attention looks at, layer by layer and step by step: what the methods rely on.

``holds``: the smallest share of the image tokens that together hold 80 % of the picture's attention, per layer.
``ppci``: PPCI(10 %) (A-VL, arXiv 2409.14846, section 3), the share that the top tenths of two steps have in common, by
how many steps lie between them, per layer. Two random tenths have 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...config import Formats, Options, Progress, PromptShape
from ...errors import BadInput, DoesNotFit
from ...kv.budget import KvPlan, kv_plan
from ...kv.cache import prompt_shape
from ...kv.methods import Full, Kept, Method, PromptLayer, Settlement, Step
from ...kv.methods.full import FullPolicy
from ...kv.methods.policy import Queries
from ...model.images import open_image
from ...serving.runtime import Runtime
from .questions import Questions

TOP, MASS, LAGS = 0.10, 0.80, 16
Scores = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Watched(Full):
    """Full attention that keeps the scores of the image rows: ``seen`` is steps by layers, the prompt's last token
    first."""

    seen: list[list[Scores]] = field(default_factory=list, compare=False)

    def policy(self, prompt: PromptShape, layers: int) -> FullPolicy:  # noqa: ARG002
        return _WatchingPolicy(self.seen)


class _WatchingPolicy(FullPolicy):
    def __init__(self, seen: list[list[Scores]]) -> None:
        self._seen = seen

    def prompt_queries(self, layer: int) -> Queries:  # noqa: ARG002
        return "last"

    def keep_prompt(self, view: PromptLayer) -> Kept:
        self._note(view.layer, view.last[view.is_image])
        return super().keep_prompt(view)

    def wants_scores(self, step: int) -> bool:  # noqa: ARG002
        return True

    def settle_step(self, step: Step) -> Settlement:
        for view in step.layers():
            self._note(view.layer, view.image)
        return super().settle_step(step)

    def _note(self, layer: int, scores: Scores) -> None:
        if layer == 0:
            self._seen.append([])
        self._seen[-1].append(scores.copy())


def watch(
    runtime: Runtime, questions: Questions, count: int, max_new_tokens: int, progress: Progress | None = None
) -> dict[str, Any]:
    """The first ``count`` questions answered once more: ``holds`` ``[layers]`` and ``ppci`` ``[layers][lags]``, means
    over all steps, None where no answer was so long. Questions that cannot be asked are left out."""
    items = questions.items[:count]
    holds: list[Scores] = []
    pairs: list[list[Scores]] = [[] for _ in range(LAGS)]
    for number, question in enumerate(items):
        options = Options(max_new_tokens=max_new_tokens)
        try:
            request = runtime.prepare(
                [open_image(question.image, runtime.max_pixels)], questions.prompt(question), options
            )
        except (BadInput, DoesNotFit):
            continue
        method = Watched()
        shape = prompt_shape(len(request.prompt), request.prompt.spans)
        plan: KvPlan[Method] = kv_plan(method, Formats(), runtime.kv_shape, shape, request.max_new_tokens - 1)
        runtime.submit(replace(request, plan=plan)).result()
        seen = np.array(method.seen)
        holds.append(share_that_holds(seen, MASS).mean(0))
        for lag, kept in enumerate(pairs, start=1):
            if len(seen) > lag:
                kept.append(ppci(seen[lag:], seen[:-lag], TOP))
        if progress:
            progress(number + 1, len(items))
    if not holds:
        raise BadInput("attention could be watched on no question: each of them was left out")
    by_lag = [np.concatenate(each).mean(0) if each else None for each in pairs]
    layers = range(runtime.kv_shape.layers)
    return {
        "questions": len(holds),
        "holds": [float(each) for each in np.mean(holds, axis=0)],
        "ppci": [[None if lag is None else float(lag[layer]) for lag in by_lag] for layer in layers],
    }


def share_that_holds(scores: Scores, mass: float) -> Scores:
    """The smallest share of the last axis whose values make up ``mass`` of its sum."""
    ordered = -np.sort(-scores, axis=-1)
    # Rounding may leave the last sum below the whole.
    reached = np.cumsum(ordered, axis=-1) >= mass * ordered.sum(-1, keepdims=True) * (1 - 1e-6)
    share: Scores = (reached.argmax(-1) + 1) / scores.shape[-1]
    return share


def ppci(a: Scores, b: Scores, top: float) -> Scores:
    """The share of the ``top`` share of the last axis that ``a`` and ``b`` have in common."""
    count = max(int(top * a.shape[-1]), 1)
    best = [np.argsort(-each, axis=-1, kind="stable")[..., :count] for each in (a, b)]
    common: Scores = (best[0][..., :, None] == best[1][..., None, :]).any(-1).mean(-1)
    return common


def draw(attention: Mapping[str, Any], figure: Any) -> None:
    """Two panels: the concentration of each layer, and PPCI by the steps between."""
    left, right = figure.subplots(1, 2)
    layers = range(len(attention["holds"]))
    left.bar(list(layers), [100 * each for each in attention["holds"]], color="#0072b2")
    left.set_xlabel("layer")
    left.set_ylabel(f"image tokens that hold {100 * MASS:g} % of the attention (%)")
    left.set_xticks(list(layers))
    for layer in layers:
        known = _known(attention["ppci"][layer])
        if known:
            right.plot(*zip(*known, strict=True), marker=".", label=f"layer {layer}", color=_shade(layer, len(layers)))
    right.axhline(TOP, color="#555555", linestyle=":", label="by chance")
    right.set_xlabel("steps between")
    top = f"of a step's top {100 * TOP:g} % of image tokens"
    right.set_ylabel(f"{top}, the share\nthat is in a later step's too (PPCI)", fontsize=8)
    right.set_ylim(0, 1)
    right.legend(fontsize=7, ncols=2)
    figure.suptitle(f"full attention on {attention['questions']} questions", fontsize=10)


def _known(row: Sequence[float | None]) -> list[tuple[int, float]]:
    return [(lag, value) for lag, value in enumerate(row, start=1) if value is not None]


def _shade(layer: int, layers: int) -> tuple[float, float, float]:
    """From light to dark blue with depth."""
    depth = layer / max(layers - 1, 1)
    return (0.75 * (1 - depth), 0.8 - 0.55 * depth, 0.95 - 0.35 * depth)
