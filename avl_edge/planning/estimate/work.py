"""What a picture, a prompt and a decode step consist of, in the units of :class:`avl_edge.machine.profile.Costs`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

from ...config import Formats, KvShape, Picture, PromptShape
from ...kv.layout import Format, smoothing_rows
from ...kv.methods import Method, Policy, Tiers
from ...model.sizes import ModelShape, Precision

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
        tokens = method.tokens_in(prompt, layer)
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
    """A decode step of one sequence, over all layers: rows attended, rows whose keys were scanned in a coarse form
    before, bytes read for both, and rows whose scores are read."""

    rows: float
    scanned_rows: float
    nbytes: float
    scored_rows: float
    scored_layers: float


def step_work(model: ModelShape, steps: Sequence[Step], weights: Precision) -> Amounts:
    """One decode step of all sequences together, one :class:`Step` each."""
    decoder = model.decoder
    rows = sum(step.rows for step in steps)
    read = decoder.layers * decoder.layer_parameters + decoder.vocabulary_parameters
    attention = (4.0 * rows + 2.0 * sum(step.scanned_rows for step in steps)) * decoder.query_size
    return {
        "decode_us_per_layer": decoder.layers,
        "decode_us_per_layer_and_sequence": decoder.layers * len(steps),
        "decode_us_per_scored_layer": sum(step.scored_layers for step in steps),
        "decode_us_per_thousand_scored_rows": sum(step.scored_rows for step in steps) / 1e3,
        "decode_ms_per_gb_of_weights": model.step_bytes(weights) / 1e9,
        "decode_ms_per_tflop": (2.0 * read * len(steps) + attention) / 1e12,
        "decode_ms_per_gb_of_rows": sum(step.nbytes for step in steps) / 1e9,
    }


class Answer:
    """The decode steps of one request, ``steps`` of them (none is taken as one, the step that would follow)."""

    def __init__(
        self, method: Method, prompt: PromptShape, shape: KvShape, steps: int, formats: Formats | None = None
    ) -> None:
        layers = shape.layers
        self._method, self._prompt, self._steps = method, prompt, max(steps, 1)
        self._policy = method.policy(prompt, layers)
        forms = {tier: Format(name) for tier, name in (formats or Formats()).by_tier().items()}
        self._row_bytes = {tier: form.read_bytes(shape) for tier, form in forms.items()}
        self._basis_bytes = {tier: form.basis_rows_read * shape.row_bytes for tier, form in forms.items()}
        self._smoothing_bytes = smoothing_rows(formats or Formats()) * shape.row_bytes
        self._scan_bytes = forms["core"].coarse_bytes(shape)
        # Layers that begin alike stay alike, and there are few kinds: one of each is counted.
        self._kinds = [(method.tiers(prompt, 0, layer), method.tokens_in(prompt, layer)) for layer in range(layers)]
        self._examples = {kind: layer for layer, kind in enumerate(self._kinds)}
        self._counts = Counter(self._kinds)

    def layers(self, steps: int) -> list[Tiers]:
        """The tiers of every layer after so many steps."""
        held = {kind: self._method.tiers(self._prompt, steps, layer) for kind, layer in self._examples.items()}
        return [held[kind] for kind in self._kinds]

    def step(self, number: int) -> Step:
        """Step ``number``, from 1: it reads what was held, and the new token's own row."""
        return self._step(self._reads(number), *self._kind(number))

    def mean(self) -> Step:
        """The average step. Of a long answer every kind of step is counted, and steps are sampled here and there."""
        numbers = range(1, self._steps + 1)
        if self._steps <= _EXACT_STEPS:
            parts = [(self.step(number), 1) for number in numbers]
        else:
            scanned = [numbers[(2 * part + 1) * self._steps // (2 * _EXACT_STEPS)] for part in range(_EXACT_STEPS)]
            reads = [sum(of) / len(scanned) for of in zip(*map(self._reads, scanned), strict=True)]
            kinds = Counter(map(self._kind, numbers))
            parts = [(self._step(reads, *kind), count) for kind, count in kinds.items()]
        return Step(
            *(sum(count * getattr(step, field.name) for step, count in parts) / self._steps for field in fields(Step))
        )

    def _step(self, reads: Sequence[float], refresh: bool, scored: bool, scans: bool) -> Step:
        core, core_bytes, stored, stored_bytes, images = reads
        rows, nbytes = (stored, stored_bytes) if refresh else (core, core_bytes)
        scanned = images * scans
        return Step(rows, scanned, nbytes + scanned * self._scan_bytes, rows * scored, len(self._kinds) * scored)

    def _kind(self, number: int) -> tuple[bool, bool, bool]:
        policy = self._policy
        return policy.reads_secondary(number), policy.wants_scores(number), policy.picks_core(number)

    def _reads(self, number: int) -> list[int]:
        """Over all layers: rows that step ``number`` reads and their bytes, the same where it refreshes, and image
        rows that are stored."""
        sums = [0] * 5
        for kind, layer in self._examples.items():
            held = self._method.tiers(self._prompt, number - 1, layer)
            core = {"text": 1 + held.text, "core": held.core}
            stored = {**core, "secondary": held.secondary}
            reads = (*self._read(core), *self._read(stored), held.core + held.secondary)
            sums = [total + self._counts[kind] * of for total, of in zip(sums, reads, strict=True)]
        return sums

    def _read(self, rows: dict[str, int]) -> tuple[int, int]:
        """Rows of those tiers of one layer, and their bytes with the basis of low-rank ones and the keys' smoothing."""
        nbytes = sum(count * self._row_bytes[tier] for tier, count in rows.items())
        basis = max(self._basis_bytes[tier] for tier, count in rows.items() if count)
        return sum(rows.values()), nbytes + basis + self._smoothing_bytes


@lru_cache(maxsize=2048)
def mean_step(method: Method, prompt: PromptShape, shape: KvShape, steps: int, formats: Formats) -> Step:
    """:meth:`Answer.mean`, remembered: a search asks again for every number of streams and every format."""
    return Answer(method, prompt, shape, steps, formats).mean()
