"""What a picture, a prompt and a decode step consist of, in the units of :class:`avl_edge.profile.Costs`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..config import PromptShape
from ..policies import Method, Policy
from ..shapes import ModelShape, Picture, Precision
from .tiers import Tiers, tiers, tokens_in

Amounts = dict[str, float]
"""How much of what each cost is the price of, under the cost's name."""

_EXACT_STEPS = 36


def vision_work(model: ModelShape, pictures: Sequence[Picture]) -> Amounts:
    """All pictures of a prompt, encoded together."""
    if not pictures:
        return {}
    flops = sum(model.vision.flops(picture) for picture in pictures)
    return {"vision_us_per_layer": model.vision.needed_layers, "vision_ms_per_tflop": flops / 1e12}


def prompt_work(model: ModelShape, method: Method, prompt: PromptShape, weights: Precision) -> Amounts:
    """Prefill of one prompt. Of the last layer and the head only the last token's output is computed."""
    decoder, last = model.decoder, model.decoder.layers - 1
    policy = method.policy(prompt, decoder.layers)
    linear, attention, scores = 2.0 * decoder.vocabulary_parameters, 0.0, 0.0
    projections = decoder.hidden_size * (decoder.query_size + 2 * decoder.key_size)
    for layer in range(decoder.layers):
        tokens = tokens_in(method, prompt, layer)
        finished = 1 if layer == last else tokens
        linear += 2.0 * (tokens * projections + finished * (decoder.layer_parameters - projections))
        attention += 2.0 * tokens**2 * decoder.query_size  # causal: half of queries times keys, twice
        scores += 2.0 * tokens * _queries(policy, prompt, layer, tokens) * decoder.query_size
    return {
        "prefill_us_per_layer": decoder.layers,
        "prefill_ms_per_gb_of_weights": model.step_bytes(weights) / 1e9,
        "prefill_ms_per_tflop": linear / 1e12,
        "prefill_ms_per_attention_tflop": attention / 1e12,
        "prefill_ms_per_score_tflop": scores / 1e12,
    }


def _queries(policy: Policy, prompt: PromptShape, layer: int, tokens: int) -> int:
    """Queries whose attention is computed once more, for the policy."""
    return {"none": 0, "last": 1, "suffix": prompt.suffix + 1, "all": tokens + 1}[policy.prompt_queries(layer)]


@dataclass(frozen=True)
class Step:
    """A decode step of one sequence: rows read and rows whose scores are looked at, over all layers."""

    rows: float
    scored_rows: float
    scored_layers: float


def step_work(model: ModelShape, steps: Sequence[Step], weights: Precision) -> Amounts:
    """One decode step of all sequences together, one :class:`Step` each."""
    decoder = model.decoder
    rows = sum(step.rows for step in steps)
    read = decoder.layers * decoder.layer_parameters + decoder.vocabulary_parameters
    attention = 4.0 * rows * decoder.query_size
    return {
        "decode_us_per_layer": decoder.layers,
        "decode_us_per_layer_and_sequence": decoder.layers * len(steps),
        "decode_us_per_scored_layer": sum(step.scored_layers for step in steps),
        "decode_us_per_thousand_scored_rows": sum(step.scored_rows for step in steps) / 1e3,
        "decode_ms_per_gb_of_weights": model.step_bytes(weights) / 1e9,
        "decode_ms_per_tflop": (2.0 * read * len(steps) + attention) / 1e12,
        "decode_ms_per_gb_of_rows": rows * model.kv_shape().row_bytes / 1e9,
    }


class Answer:
    """The decode steps of one request, ``steps`` of them (none is taken as one, the step that would follow)."""

    def __init__(self, method: Method, prompt: PromptShape, layers: int, steps: int) -> None:
        self._method, self._prompt, self._steps = method, prompt, max(steps, 1)
        self._policy = method.policy(prompt, layers)
        # Layers that begin alike stay alike, and there are few kinds: one of each is counted.
        self._kinds = [(tiers(method, prompt, 0, layer), tokens_in(method, prompt, layer)) for layer in range(layers)]
        self._examples = {kind: layer for layer, kind in enumerate(self._kinds)}
        self._counts = Counter(self._kinds)

    def layers(self, steps: int) -> list[Tiers]:
        """The tiers of every layer after so many steps."""
        held = {kind: tiers(self._method, self._prompt, steps, layer) for kind, layer in self._examples.items()}
        return [held[kind] for kind in self._kinds]

    def step(self, number: int) -> Step:
        """Step ``number``, from 1: it reads what was held, and the new token's own row."""
        always, secondary = self._reads(number)
        return self._step(always, secondary, *self._kind(number))

    def mean(self) -> Step:
        """The average step. Of a long answer every kind of step is counted, and rows are looked at here and there."""
        numbers = range(1, self._steps + 1)
        if self._steps <= _EXACT_STEPS:
            parts = [(self.step(number), 1) for number in numbers]
        else:
            looked_at = [numbers[(2 * part + 1) * self._steps // (2 * _EXACT_STEPS)] for part in range(_EXACT_STEPS)]
            always, secondary = (sum(of) / len(looked_at) for of in zip(*map(self._reads, looked_at), strict=True))
            kinds = Counter(map(self._kind, numbers))
            parts = [(self._step(always, secondary, *kind), count) for kind, count in kinds.items()]
        return Step(
            sum(count * step.rows for step, count in parts) / self._steps,
            sum(count * step.scored_rows for step, count in parts) / self._steps,
            sum(count * step.scored_layers for step, count in parts) / self._steps,
        )

    def _step(self, always: float, secondary: float, refresh: bool, scored: bool) -> Step:
        rows = always + refresh * secondary
        return Step(rows, rows * scored, len(self._kinds) * scored)

    def _kind(self, number: int) -> tuple[bool, bool]:
        return self._policy.reads_secondary(number), self._policy.wants_scores(number)

    def _reads(self, number: int) -> tuple[int, int]:
        """Rows over all layers that step ``number`` reads in any case, and those it reads when it refreshes."""
        always = secondary = 0
        for kind, layer in self._examples.items():
            held = tiers(self._method, self._prompt, number - 1, layer)
            always += self._counts[kind] * (1 + held.text + held.core)
            secondary += self._counts[kind] * held.secondary
        return always, secondary


@lru_cache(maxsize=2048)
def mean_step(method: Method, prompt: PromptShape, layers: int, steps: int) -> Step:
    """:meth:`Answer.mean`, remembered: a search asks again for every number of streams and every format."""
    return Answer(method, prompt, layers, steps).mean()
