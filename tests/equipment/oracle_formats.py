"""Packed rows on transformers' own LLaVA: the definition that the runtime's formats are checked against.

The model runs in float64 with an attention of ours in place of its eager one: it attends, row by row, the keys and
values that a runtime with packed rows would find. A row's key and value are quantised and read back when the row is
stored, and again whenever it moves to a tier of another format: promoting a row does not bring back what was lost.
The prompt's own attention is over rows as they were computed. The quantisation is written anew from its description:

* int8: q from -127 to 127, one scale per row and head; int4: q from -8 to 7, one scale per row and group of
  neighbouring dimensions (32 of them, or the largest power of two up to that which divides the head);
* the scale is the largest magnitude over 127, or the value that has it over -8 (of two, the positive one), rounded to
  float16; q is the value over that, rounded half to even;
* what is quantised of a key is (key - center) / scale, channel by channel, where any tier is packed: in each pair of
  channels that RoPE turns together, the keys of the prompt are a bias that turns, a constant that does not (which least
  squares count a hundredth too high), and a rest; the center is the middle of what the first two become at 128
  positions of the whole answer, the scale half of that range and three of the standard deviations that the turned rest
  has there on average; over the head's largest, 1/64 at least;
* a coarse scan of an int8 key sees, of q + 128, the high four bits, and takes the middle of the sixteen values.

Values are taken in float32, the widest in which rows are packed. Who is core, stored and text is decided as in
`tests/equipment/oracle.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, LlavaForConditionalGeneration

from tests.equipment.oracle import AvlSettings, LayerRows, OracleStep, far, keep_text, top

NAME = "packed_rows_oracle"


@dataclass(frozen=True)
class TierFormats:
    """``exact``, ``int8`` or ``int4`` for each tier, or that of keys and that of values, as in ``int8/int4``."""

    text: str = "exact"
    core: str = "exact"
    secondary: str = "exact"


def _quantised(rows: Tensor, name: str) -> tuple[np.ndarray, np.ndarray]:
    """q and scales of ``[..., d]``, both float32 ``[..., groups, dimensions]``."""
    size = rows.shape[-1] if name == "int8" else math.gcd(rows.shape[-1], 32)
    values = rows.numpy().astype(np.float32).reshape(*rows.shape[:-1], -1, size)
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    if name == "int8":
        lowest, highest, widest = -127, 127, np.maximum(high, -low) / np.float32(127)
    else:
        lowest, highest, widest = -8, 7, np.where(high >= -low, high, low) / np.float32(-8)
    scales = widest.astype(np.float16).astype(np.float32)
    q = np.rint(np.divide(values, scales, out=np.zeros_like(values), where=scales != 0))
    return np.clip(q, lowest, highest), scales


def packed(rows: Tensor, name: str) -> Tensor:
    """``[..., d]`` as it is read back from a format, float64."""
    if name == "exact":
        return rows
    q, scales = _quantised(rows, name)
    return torch.from_numpy((q.astype(np.float64) * scales).reshape(rows.shape))


@dataclass(frozen=True)
class Smoothing:
    """``center`` and ``scale`` ``[kv_heads, d]`` float64."""

    center: Tensor
    scale: Tensor

    @classmethod
    def of(cls, keys: Tensor, positions: list[int], reach: int, frequencies: Tensor) -> Smoothing:
        """From the keys ``[n, kv_heads, d]`` of a prompt at ``positions``, in a sequence of up to ``reach`` tokens."""
        turns, pairs = _turns(positions, frequencies), torch.complex(*keys.chunk(2, -1))
        both, rest = _fitted(pairs, turns), torch.empty_like(pairs)
        for pair in range(pairs.shape[-1]):
            for head in range(pairs.shape[1]):
                bias, constant = both[:, head, pair]
                rest[:, head, pair] = (pairs[:, head, pair] - constant) / turns[:, pair] - bias
        carried, spread = [], torch.zeros(keys.shape[1:], dtype=torch.float64)
        for sample in range(128):
            turn = _turns([sample * (reach - 1) // 127], frequencies)
            carried.append(_halves(both[0] * turn + both[1]))
            spread += _halves(rest * turn).square().mean(0) / 128
        low, high = torch.stack(carried).amin(0), torch.stack(carried).amax(0)
        extent = (high - low) / 2 + 3 * spread.sqrt()
        return cls((low + high) / 2, (extent / extent.amax(-1, keepdim=True)).clamp(min=1 / 64))

    def through(self, how: Callable[[Tensor, str], Tensor], keys: Tensor, name: str) -> Tensor:
        return how((keys - self.center) / self.scale, name) * self.scale + self.center


def _fitted(pairs: Tensor, turns: Tensor) -> Tensor:
    """Bias and constant, complex ``[2, kv_heads, d / 2]``: numpy's least squares, the penalty as one more equation."""
    count, heads, halves = pairs.shape
    found = torch.empty(2, heads, halves, dtype=torch.complex128)
    for pair in range(halves):
        equations = np.stack([turns[:, pair].numpy(), np.ones(count)], 1)
        equations = np.concatenate([equations, [[0, math.sqrt(0.01 * count)]]])
        truth = np.concatenate([pairs[:, :, pair].numpy(), np.zeros((1, heads))])
        found[:, :, pair] = torch.from_numpy(np.linalg.lstsq(equations, truth, rcond=None)[0])
    return found


def _turns(positions: list[int], frequencies: Tensor) -> Tensor:
    """complex128 ``[n, d / 2]``; angles, cosines and sines are float32, as every RoPE has them."""
    angles = torch.tensor(positions).float()[:, None] * frequencies.float()
    return torch.complex(angles.cos().double(), angles.sin().double())


def _halves(numbers: Tensor) -> Tensor:
    return torch.cat([numbers.real, numbers.imag], -1)


def coarse(rows: Tensor, name: str) -> Tensor:
    """What a coarse scan sees of keys ``[..., d]`` that are stored in a format: half of int8, of others all."""
    if name != "int8":
        return packed(rows, name)
    q, scales = _quantised(rows, name)
    middle = (q + 128) // 16 * 16 + 8 - 128
    return torch.from_numpy((middle.astype(np.float64) * scales).reshape(rows.shape))


@dataclass
class Layer:
    """What one layer holds. ``keys`` and ``values`` ``[positions, kv_heads, d]`` are all rows as they would be read."""

    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    coarse_keys: Tensor = field(default_factory=lambda: torch.empty(0))  # the keys, as a coarse scan sees them
    visible: Tensor = field(default_factory=lambda: torch.empty(0))  # of the prompt: (queries, keys)
    weights: Tensor = field(default_factory=lambda: torch.empty(0))  # of the last call: head means (queries, keys)
    stored: list[int] = field(default_factory=list)
    core: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)  # after the first image
    sums: dict[int, float] = field(default_factory=dict)
    seen: int = 0
    attended: Callable[[Tensor, float], list[int]] | None = None  # positions, from the query [heads, d] and its scale
    text_format: str = "exact"
    dropped: list[int] = field(default_factory=list)  # of a shared prefix's images
    tokens: list[int] = field(default_factory=list)  # of the prompt that reach this layer, where not all do
    smoothing: Smoothing | None = None

    def store(self, positions: list[int], name: str) -> None:
        """Take rows as they are now into a format."""
        if not positions:
            return
        keys = self.keys[positions]
        keys_in, *others = name.split("/")
        self.values[positions] = packed(self.values[positions], *others or [name])
        through = self.smoothing.through if self.smoothing else lambda how, keys, name: how(keys, name)
        self.keys[positions], self.coarse_keys[positions] = (
            through(packed, keys, keys_in),
            through(coarse, keys, keys_in),
        )


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    layer: Layer = module.oracle
    queries, keys, values = query[0], key[0].transpose(0, 1), value[0].transpose(0, 1)
    group = queries.shape[0] // keys.shape[1]
    if len(layer.visible):
        layer.keys, layer.values, layer.coarse_keys = keys.clone(), values.clone(), keys.clone()
        visible = layer.visible
    else:
        layer.keys, layer.values = torch.cat([layer.keys, keys[-1:]]), torch.cat([layer.values, values[-1:]])
        layer.coarse_keys = torch.cat([layer.coarse_keys, keys[-1:]])
        layer.store([len(layer.keys) - 1], layer.text_format)
        assert layer.attended
        visible = torch.zeros(1, len(layer.keys), dtype=torch.bool)
        visible[0, layer.attended(queries[:, 0], scaling)] = True
    repeated = [rows.transpose(0, 1).repeat_interleave(group, 0) for rows in (layer.keys, layer.values)]
    logits = (queries @ repeated[0].transpose(1, 2)) * scaling
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    layer.weights = weights.mean(0)
    return (weights @ repeated[1]).transpose(0, 1)[None], None


AttentionInterface.register(NAME, attention)


def load_model(directory: Path) -> LlavaForConditionalGeneration:
    """The checkpoint in float64, its language model with the attention above."""
    implementation = {"text_config": NAME, "vision_config": "sdpa"}
    return LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation=implementation).double().eval()


class Oracle:
    """One prompt, run greedily. ``formats`` hold from the end of the prompt on."""

    def __init__(
        self, model: LlavaForConditionalGeneration, input_ids: list[int], pixels: Tensor, formats: TierFormats
    ) -> None:
        self.model, self.prompt, self.pixels, self.formats = model, input_ids, pixels.double(), formats
        self.images = [place for place, token in enumerate(input_ids) if token == model.config.image_token_id]
        self.system = list(range(self.images[0]))
        self.text = sorted(set(range(self.images[0], len(input_ids))) - set(self.images))
        self.modules = [layer.self_attn for layer in model.model.language_model.layers]
        self.frequencies = model.model.language_model.rotary_emb.inv_freq.double()
        self.layers: list[Layer] = []

    def _prefill(self, visible: list[Tensor]) -> tuple[Tensor, Any]:
        self.layers = [Layer(visible=seen, text_format=self.formats.text) for seen in visible]
        for module, layer in zip(self.modules, self.layers, strict=True):
            module.oracle = layer
        out = self.model(
            input_ids=torch.tensor([self.prompt]), pixel_values=self.pixels, use_cache=True, logits_to_keep=1
        )
        for layer in self.layers:
            layer.visible = torch.empty(0)
        return out.logits[0, -1], out.past_key_values

    def _rank(self, layer: Layer, mean: bool) -> list[float]:
        scores: list[float] = layer.weights[self.text if mean else [-1]].mean(0).tolist()
        return scores

    def _by_values(self, layer: Layer, secondary: int) -> list[int]:
        """The image tokens that are stored because their values stand out."""
        return top(far(layer.values.transpose(0, 1), self.images), self.images, secondary * len(self.images) // 100)

    def _smooth(self, layer: Layer, tokens: list[int], reach: int) -> None:
        if {self.formats.text, self.formats.core, self.formats.secondary} != {"exact"}:
            layer.smoothing = Smoothing.of(layer.keys[tokens], tokens, reach, self.frequencies)

    def _store_prompt(self, steps: int) -> None:
        for layer in self.layers:
            self._smooth(layer, layer.tokens or list(range(len(self.prompt))), len(self.prompt) + steps - 1)
            layer.store(self.system + layer.text, self.formats.text)
            layer.store(layer.core, self.formats.core)
            layer.store(sorted(set(layer.stored) - set(layer.core)), self.formats.secondary)

    def _step(self, token: int, cache: Any) -> tuple[Tensor, Any]:
        own = cache.get_seq_length()
        for layer in self.layers:
            layer.text = [*layer.text, own]
            layer.sums[own] = 0.0
            layer.seen += 1
        out = self.model(
            input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[own]]), past_key_values=cache, use_cache=True
        )
        return out.logits[0, -1], out.past_key_values

    def _result(self, logits: Tensor) -> OracleStep:
        rows = [
            LayerRows(
                tuple(self.system + layer.text),
                tuple(sorted(layer.core)),
                tuple(sorted(set(layer.stored) - set(layer.core))),
            )
            for layer in self.layers
        ]
        return OracleStep(int(logits.argmax()), logits, rows)

    @torch.no_grad()
    def avl(self, settings: AvlSettings, steps: int) -> list[OracleStep]:
        """A-VL; with everything kept and no refresh it is full attention, all image rows in the core's format."""
        length, total, depth = len(self.prompt), len(self.images), len(self.modules)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        survivors = self.images
        if settings.prune_layer < depth and settings.prefill_keep < 100:
            self._prefill([causal] * depth)
            scores = self._rank(self.layers[settings.prune_layer], bool(settings.prompt_mean))
            survivors = top(scores, self.images, settings.prefill_keep * total // 100)
        pruned = torch.zeros(length, dtype=torch.bool)
        pruned[sorted(set(self.images) - set(survivors))] = True
        deep = (causal & ~pruned) | torch.eye(length, dtype=torch.bool)
        logits, cache = self._prefill([causal if at <= settings.prune_layer else deep for at in range(depth)])
        core = settings.core * total // 100
        for index, layer in enumerate(self.layers):
            scores = self._rank(layer, bool(settings.prompt_mean))
            candidates = self.images if index <= settings.prune_layer else survivors
            layer.tokens = sorted({*self.system, *candidates, *self.text})
            assert not settings.by_values or settings.prefill_keep == 100, "values are not ranked among survivors here"
            layer.stored = top(scores, candidates, settings.secondary * total // 100)
            if settings.by_values:
                layer.stored = self._by_values(layer, settings.secondary)
            layer.core = top(scores, layer.stored, core)
            layer.sums = dict(zip(self.text, layer.weights[self.text][:, self.text].sum(0).tolist(), strict=True))
            layer.text, layer.seen = keep_text(settings, self.text, layer.sums, len(self.text)), len(self.text)
        self._store_prompt(steps)
        result = [self._result(logits)]
        for t in range(1, steps):
            refresh = settings.refresh > 0 and t % settings.refresh == 0
            for layer in self.layers:
                layer.attended = self._fixed(layer, refresh)
            logits, cache = self._step(result[-1].token, cache)
            for layer in self.layers:
                weights = layer.weights[-1].tolist()
                for position in layer.text:
                    layer.sums[position] += weights[position]
                if refresh:
                    self._move(layer, top(weights, layer.stored, core))
                layer.text = keep_text(settings, layer.text, layer.sums, layer.seen)
            result.append(self._result(logits))
        return result

    def _fixed(self, layer: Layer, refresh: bool) -> Callable[[Tensor, float], list[int]]:
        return lambda _query, _scale: self.system + (layer.stored if refresh else layer.core) + layer.text

    def _move(self, layer: Layer, core: list[int]) -> None:
        promoted, demoted = sorted(set(core) - set(layer.core)), sorted(set(layer.core) - set(core))
        if self.formats.core != self.formats.secondary:
            layer.store(promoted, self.formats.core)
            layer.store(demoted, self.formats.secondary)
        layer.core = core

    @torch.no_grad()
    def coarse(self, secondary: int, core: int, mass: int, steps: int) -> list[OracleStep]:
        """Every step picks its image rows by a coarse scan of all stored ones, layer by layer."""
        length, depth = len(self.prompt), len(self.modules)
        total = len(self.images)
        logits, cache = self._prefill([torch.ones(length, length, dtype=torch.bool).tril()] * depth)
        most = core * total // 100
        for layer in self.layers:
            layer.stored = self._by_values(layer, secondary)
            layer.core, layer.text = layer.stored, self.text
            layer.attended = self._nucleus(layer, most, mass / 100)
        self._store_prompt(steps)
        result = [self._result(logits)]
        for _ in range(1, steps):
            logits, cache = self._step(result[-1].token, cache)
            result.append(self._result(logits))
        return result

    def _nucleus(self, layer: Layer, most: int, mass: float) -> Callable[[Tensor, float], list[int]]:
        def choose(query: Tensor, scale: float) -> list[int]:
            keys = layer.coarse_keys[layer.stored].transpose(0, 1)
            keys = keys.repeat_interleave(len(query) // len(keys), 0)
            weights = (torch.einsum("hd,hrd->hr", query, keys) * scale).softmax(-1).mean(0).tolist()
            ranked = sorted(range(len(weights)), key=lambda place: (-weights[place], place))
            held, chosen = 0.0, []
            for place in ranked[:most]:
                chosen.append(layer.stored[place])
                held += weights[place]
                if held >= mass * sum(weights):
                    break
            layer.core = sorted(chosen)
            return self.system + layer.core + layer.text

        return choose
