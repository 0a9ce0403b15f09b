"""A-VL, step by step, on transformers' own LLaVA or another of its models: the definition that the runtime is checked
against.

Nothing is ever dropped here. The model keeps its full cache, attention is eager, and each decoder layer gets its own
additive 4-D mask that hides the rows which A-VL does not attend in that layer at that step. Positions never change.
Scores are post-softmax weights, averaged over the heads. Counts are integer percents, computed exactly. Of equal
scores the one at the lower position wins. To keep rounding from making ties, run the model in float64
(`load_model`); transformers' eager attention takes its softmax, and the norms their mean, in float32 all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LlavaForConditionalGeneration

Given = Tensor | Mapping[str, Tensor]
"""Pixels of pictures, or all that transformers' processor gives its model, pixels in the model's dtype."""


@dataclass(frozen=True)
class AvlSettings:
    """Integer percents. P, S and C are of the number N of image tokens in the prompt, all images together."""

    prefill_keep: int = 90  # P: image tokens that go on to the layers after `prune_layer`
    secondary: int = 45  # S: image rows stored per layer, the core among them
    core: int = 30  # C: image rows attended on an ordinary step
    refresh: int = 3  # K: every K-th decode step attends all stored rows and picks the core anew; 0 = never
    text_keep: int = 70  # T: of the text rows after the first image seen so far in a layer
    heavy: int = 70  # of the text budget: rows kept by their sum of attention, the rest by recency
    text_floor: int = 20  # the least text budget, in rows
    prune_layer: int = 2  # 0-based; the prune takes effect after this whole layer
    by_values: int = 0  # 1: prefill ranks image tokens by their values' distance from the mean, not by attention
    per_span: int = 0  # 1: P, S and C are of each picture's tokens, which are ranked among themselves
    prompt_mean: int = 0  # 1: prefill ranks image tokens by the mean over all text after the image, not the last token


@dataclass(frozen=True)
class LayerRows:
    """Positions of the rows that a layer holds, ascending. `text` includes the system prefix, `secondary` is what is
    stored of the images beside the core."""

    text: tuple[int, ...]
    core: tuple[int, ...]
    secondary: tuple[int, ...]


@dataclass(frozen=True)
class OracleStep:
    """`token` is the argmax of `logits` (vocabulary size); `rows` per layer, as they stand after this step settled."""

    token: int
    logits: Tensor
    rows: list[LayerRows]


@dataclass
class _Layer:
    stored: list[int]  # image rows, core among them
    core: list[int]
    text: list[int]  # text rows after the first image
    sums: dict[int, float]  # running sum of attention of every text row seen
    seen: int  # text rows after the first image so far, the evicted ones included


def load_model(directory: Path) -> LlavaForConditionalGeneration:
    """The checkpoint in float64 with eager attention."""
    model = LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager")
    return model.double().eval()


def top(scores: Sequence[float], candidates: Iterable[int], count: int) -> list[int]:
    """The `count` candidates with the highest scores, ascending; of equal scores the lower position first."""
    return sorted(sorted(candidates, key=lambda position: (-scores[position], position))[:count])


def text_budget(settings: AvlSettings, seen: int) -> int:
    return max(round(Fraction(settings.text_keep * seen, 100)), settings.text_floor)


def keep_text(settings: AvlSettings, text: list[int], sums: dict[int, float], seen: int) -> list[int]:
    """The rows of `text` (ascending) that stay: the most recent ones, and of the others those with the highest sums."""
    budget = text_budget(settings, seen)
    if len(text) <= budget:
        return text
    heavy = settings.heavy * budget // 100
    split = len(text) - (budget - heavy)
    ranked = sorted(text[:split], key=lambda position: (-sums[position], position))
    return sorted(ranked[:heavy]) + text[split:]


@contextmanager
def _masks(model: Any, visible: list[Tensor]) -> Iterator[None]:
    """Give every decoder layer's attention its own mask: `visible[l]` is (queries, keys), True where attended."""

    def hook(mask: Tensor) -> Any:
        return lambda _module, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    handles = []
    for layer, seen in zip(model.model.language_model.layers, visible, strict=True):
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, float("-inf"))
        handles.append(layer.self_attn.register_forward_pre_hook(hook(mask[None, None]), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(
    model: Any,
    visible: list[Tensor],
    ids: list[int],
    given: Given | None = None,
    cache: Cache | None = None,
) -> tuple[Tensor, list[Tensor], Cache]:
    """The logits of the last token, the head-mean weights per layer (queries, keys), and the full cache."""
    start = 0 if cache is None else cache.get_seq_length()
    pictures = {"pixel_values": given} if isinstance(given, Tensor) else dict(given or {})
    positions = rope_positions(model, len(ids), start, pictures)
    names = ("pixel_values", "image_sizes", "image_grid_thw", "mm_token_type_ids")
    with _masks(model, visible):
        out = model(
            input_ids=torch.tensor([ids]),
            position_ids=positions,
            **{name: value for name, value in pictures.items() if name in names and cache is None},
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
            logits_to_keep=1,
        )
    return out.logits[0, -1], [weights[0].double().mean(0) for weights in out.attentions], out.past_key_values


def rope_positions(model: Any, count: int, start: int, given: Mapping[str, Tensor]) -> Tensor:
    """RoPE's: the places of tokens, or what transformers makes of them for a model with positions of three axes."""
    places = torch.arange(start, start + count)[None]
    if "image_grid_thw" not in given:
        return places
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    of_prompt, delta = model.model.get_rope_index(*(given[name] for name in names))
    return of_prompt if start == 0 else (places + delta).expand(3, 1, -1)


def far(values: Tensor, among: list[int]) -> list[float]:
    """How far each token's value [heads, tokens, d] lies from the mean value of the tokens `among`: squared."""
    rows = values.double().transpose(0, 1).flatten(1)
    mean = sum(rows[token] for token in among) / len(among)
    return [float(((row - mean) ** 2).sum()) for row in rows]


@dataclass(frozen=True)
class _Prompt:
    """Token ids, and the positions of the image tokens and of the text after the first of them."""

    ids: list[int]
    images: list[int]
    text: list[int]

    @classmethod
    def of(cls, ids: list[int], image_token: int) -> _Prompt:
        images = [position for position, token in enumerate(ids) if token == image_token]
        if not images or images[-1] == len(ids) - 1:
            raise ValueError("the prompt needs an image and text after it")
        return cls(ids, images, sorted(set(range(images[0], len(ids))) - set(images)))

    def pick(self, settings: AvlSettings, scores: Sequence[float], among: list[int], percent: int) -> list[int]:
        """That share of all image tokens, or of each picture's, from those `among` them that are left."""
        pictures = [self.images]
        if settings.per_span:  # a picture is an unbroken run
            breaks = [n for n in range(1, len(self.images)) if self.images[n] != self.images[n - 1] + 1]
            pictures = [self.images[a:b] for a, b in zip([0, *breaks], [*breaks, None], strict=True)]
        chosen = [top(scores, set(each) & set(among), percent * len(each) // 100) for each in pictures]
        return sorted(token for each in chosen for token in each)

    @property
    def system(self) -> list[int]:
        """The positions before the first image."""
        return list(range(self.images[0]))

    def rank(self, settings: AvlSettings, weights: Tensor) -> list[float]:
        """What each token receives of attention in a layer, of ``weights`` (queries, keys)."""
        queries = self.text if settings.prompt_mean else [len(self.ids) - 1]
        scores: list[float] = weights[queries].mean(0).tolist()
        return scores

    def worth(self, settings: AvlSettings, weights: Tensor, values: Tensor, among: list[int]) -> list[float]:
        """What image tokens are stored by, `among` being those that the layer sees."""
        return far(values, among) if settings.by_values else self.rank(settings, weights)


@torch.no_grad()
def generate(model: Any, input_ids: Tensor, given: Given, settings: AvlSettings, steps: int) -> list[OracleStep]:
    """`steps` greedy tokens for one prompt with at least one image; entry 0 is the prefill, entry t decode step t.
    An end-of-sequence token does not stop it."""
    if model.config.text_config._attn_implementation != "eager":
        raise ValueError("the scores need eager attention")
    prompt = _Prompt.of(input_ids.flatten().tolist(), model.config.image_token_id)
    given = given.to(model.dtype) if isinstance(given, Tensor) else given
    logits, layers, cache = _prefill(model, prompt, given, settings)
    result = [_step(logits, prompt.system, layers)]
    for t in range(1, steps):
        own = len(prompt.ids) + t - 1
        refresh = settings.refresh > 0 and t % settings.refresh == 0
        visible = []
        for layer in layers:
            layer.text = [*layer.text, own]
            layer.seen += 1
            layer.sums[own] = 0.0
            attended = torch.zeros(1, own + 1, dtype=torch.bool)
            attended[0, prompt.system + (layer.stored if refresh else layer.core) + layer.text] = True
            visible.append(attended)
        logits, weights, cache = forward(model, visible, [result[-1].token], given, cache)
        for layer, layer_weights in zip(layers, weights, strict=True):
            scores = layer_weights[-1].tolist()
            for position in layer.text:
                layer.sums[position] += scores[position]
            if refresh:
                layer.core = prompt.pick(settings, scores, layer.stored, settings.core)
            layer.text = keep_text(settings, layer.text, layer.sums, layer.seen)
        result.append(_step(logits, prompt.system, layers))
    return result


def _prefill(model: Any, prompt: _Prompt, given: Given, settings: AvlSettings) -> tuple[Tensor, list[_Layer], Cache]:
    """The logits of the last token, what each layer keeps of the prompt, and the full cache."""
    length, depth = len(prompt.ids), len(model.model.language_model.layers)
    survivors = _survivors(model, prompt, given, settings)
    # In the layers after the prune nobody attends a pruned token. (It attends itself, so that its own row of weights is
    # defined; nothing reads what it computes.)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    pruned = torch.zeros(length, dtype=torch.bool)
    pruned[sorted(set(prompt.images) - set(survivors))] = True
    deep = (causal & ~pruned) | torch.eye(length, dtype=torch.bool)
    visible = [causal if index <= settings.prune_layer else deep for index in range(depth)]
    logits, weights, cache = forward(model, visible, prompt.ids, given)

    text, layers = prompt.text, []
    for index in range(depth):
        seen = prompt.images if index <= settings.prune_layer else survivors
        worth = prompt.worth(settings, weights[index], cache.layers[index].values[0], seen)
        stored = prompt.pick(settings, worth, seen, settings.secondary)
        sums = dict(zip(text, weights[index][text][:, text].sum(0).tolist(), strict=True))
        layers.append(
            _Layer(
                stored=stored,
                core=prompt.pick(settings, prompt.rank(settings, weights[index]), stored, settings.core),
                text=keep_text(settings, text, sums, len(text)),
                sums=sums,
                seen=len(text),
            )
        )
    return logits, layers, cache


def _survivors(model: Any, prompt: _Prompt, given: Given, settings: AvlSettings) -> list[int]:
    """The image tokens that go on after the prune. It ranks by the score in one shallow layer, which a pass over all
    rows finds."""
    at, length, depth = settings.prune_layer, len(prompt.ids), len(model.model.language_model.layers)
    if at >= depth:
        return prompt.images
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    _, weights, cache = forward(model, [causal] * depth, prompt.ids, given)
    worth = prompt.worth(settings, weights[at], cache.layers[at].values[0], prompt.images)
    return prompt.pick(settings, worth, prompt.images, settings.prefill_keep)


def _step(logits: Tensor, system: list[int], layers: list[_Layer]) -> OracleStep:
    rows = [
        LayerRows(
            text=tuple(system + layer.text),
            core=tuple(layer.core),
            secondary=tuple(sorted(set(layer.stored) - set(layer.core))),
        )
        for layer in layers
    ]
    return OracleStep(int(logits.argmax()), logits, rows)
