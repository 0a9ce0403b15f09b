"""H2O, FastV and StreamingLLM, step by step, on transformers' own LLaVA: what the runtime is checked against.

As in `tests/equipment/oracle.py` nothing is ever dropped: the model keeps its full cache, and masks hide from each
layer the rows that a method does not hold there. Percents are integers, counts exact, of equal scores the lower
position wins. A step attends the rows held and its own; what it settles holds from the next step on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.equipment.oracle import LayerRows, OracleStep, forward, top

Positions = list[int]
Settle = Callable[[int, int, Positions, Tensor], Positions]
"""(layer, step, rows that were attended, weights over all positions) to the rows that stay; step 0 is the prefill and
its weights are (queries, keys), those of a later step (1, keys)."""


@dataclass(frozen=True)
class Case:
    """A model in float64 with eager attention, and one prompt for it; `steps` greedy tokens are wanted."""

    model: LlavaForConditionalGeneration
    prompt: list[int]
    pixel_values: Tensor | None
    steps: int

    @property
    def depth(self) -> int:
        return len(self.model.model.language_model.layers)

    @property
    def images(self) -> Positions:
        return [i for i, token in enumerate(self.prompt) if token == self.model.config.image_token_id]

    @property
    def causal(self) -> Tensor:
        return torch.ones(len(self.prompt), len(self.prompt), dtype=torch.bool).tril()

    def prefill(self, visible: list[Tensor]) -> tuple[Tensor, list[Tensor], object]:
        return forward(self.model, visible, self.prompt, self.pixel_values)


@torch.no_grad()
def answer(case: Case, visible: list[Tensor], held: list[Positions], settle: Settle) -> list[OracleStep]:
    """Greedy tokens: prefill under the masks `visible`, of which layer l offers the rows `held[l]` to `settle`."""
    logits, weights, cache = case.prefill(visible)
    held = [settle(layer, 0, rows, weights[layer]) for layer, rows in enumerate(held)]
    result = [_step(case, logits, held)]
    for step in range(1, case.steps):
        own = len(case.prompt) + step - 1
        held = [[*rows, own] for rows in held]
        masks = []
        for rows in held:
            mask = torch.zeros(1, own + 1, dtype=torch.bool)
            mask[0, rows] = True
            masks.append(mask)
        logits, weights, cache = forward(case.model, masks, [result[-1].token], cache=cache)
        held = [settle(layer, step, rows, weights[layer]) for layer, rows in enumerate(held)]
        result.append(_step(case, logits, held))
    return result


def _step(case: Case, logits: Tensor, held: list[Positions]) -> OracleStep:
    images = set(case.images)
    rows = [
        LayerRows(
            text=tuple(position for position in layer if position not in images),
            core=tuple(position for position in layer if position in images),
            secondary=(),
        )
        for layer in held
    ]
    return OracleStep(int(logits.argmax()), logits, rows)


def h2o(case: Case, budget: int = 50, heavy: int = 50, grow: int = 0) -> list[OracleStep]:
    """Heavy hitters by the sum of all weights received while held, and the most recent rows."""
    length = len(case.prompt)
    sums = [[0.0] * (length + case.steps) for _ in range(case.depth)]

    def settle(layer: int, step: int, rows: Positions, weights: Tensor) -> Positions:
        received = weights.sum(0).tolist()
        for position in rows:
            sums[layer][position] += received[position]
        count = max(budget * (length + grow * step) // 100, 1)
        if len(rows) <= count:
            return rows
        hitters = heavy * count // 100
        split = len(rows) - (count - hitters)
        return top(sums[layer], rows[:split], hitters) + rows[split:]

    return answer(case, [case.causal] * case.depth, [list(range(length))] * case.depth, settle)


def streaming(case: Case, sinks: int = 4, window: int = 1020) -> list[OracleStep]:
    """The first `sinks` positions of the sequence and the last `window` positions so far."""
    length = len(case.prompt)

    def settle(_layer: int, step: int, rows: Positions, _weights: Tensor) -> Positions:
        return [position for position in rows if position < sinks or position >= length + step - window]

    return answer(case, [case.causal] * case.depth, [list(range(length))] * case.depth, settle)


def fastv(case: Case, layer: int = 2, drop: int = 50) -> list[OracleStep]:
    """Layers from `layer` on never see the image tokens that score lowest in the layer before."""
    length, images = len(case.prompt), case.images
    kept = images
    if layer < case.depth:
        with torch.no_grad():
            _, weights, _ = case.prefill([case.causal] * case.depth)
        kept = top(weights[layer - 1][-1].tolist(), images, round(Fraction((100 - drop) * len(images), 100)))
    dropped = set(images) - set(kept)
    # A dropped token attends itself, so that its own row of weights is defined; nothing reads what it computes.
    deep = case.causal.clone()
    deep[:, sorted(dropped)] = False
    deep |= torch.eye(length, dtype=torch.bool)
    everything = list(range(length))
    survivors = [position for position in everything if position not in dropped]
    return answer(
        case,
        [case.causal if index < layer else deep for index in range(case.depth)],
        [everything if index < layer else survivors for index in range(case.depth)],
        lambda _layer, _step, rows, _weights: rows,
    )
