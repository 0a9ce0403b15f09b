"""AttentionPack, step by step, on transformers' own LLaVA: the definition that the runtime is checked against.

After the prompt, which runs as ever, the keys and values of the image tokens in transformers' cache are replaced, layer
by layer and before every step, by what the truncated SVD of numpy (float64) leaves of them: all heads merged, keys
turned back by RoPE first and forth again, the important rows by R directions, the others by r. Singular vectors come
from the rows themselves, so coefficients and bases are never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.equipment.oracle import Given, forward, rope_positions, top

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PackSettings:
    """``core``: percent of the image tokens read by ``rank`` directions, others by ``low``; ``decay`` in percent."""

    rank: int
    low: int
    core: int = 25
    decay: int = 90


@dataclass(frozen=True)
class PackStep:
    """The token, its logits, and per layer the core's positions as they stand after the step settled."""

    token: int
    logits: Tensor
    core: list[tuple[int, ...]]


def truncated(rows: Matrix, rank: int) -> Matrix:
    """The nearest matrix of that rank."""
    u, s, v = np.linalg.svd(rows, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def _swap(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class _Layer:
    """The two low-rank forms of one layer's image rows, ``[kv_heads, images, d]`` each, keys after RoPE."""

    def __init__(self, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, settings: PackSettings) -> None:
        plain = (keys * cos - _swap(keys) * sin) / (cos**2 + sin**2)
        forms = []
        for rank in (settings.rank, settings.low):
            low_keys, low_values = (self._low(each, rank) for each in (plain, values))
            forms.append((low_keys * cos + _swap(low_keys) * sin, low_values))
        self.high, self.low = forms

    @staticmethod
    def _low(rows: Tensor, rank: int) -> Tensor:
        heads, count, dim = rows.shape
        merged = rows.transpose(0, 1).reshape(count, heads * dim).numpy()
        return torch.from_numpy(truncated(merged, rank)).view(count, heads, dim).transpose(0, 1)

    def mixed(self, core: Sequence[bool]) -> tuple[Tensor, Tensor]:
        mask = torch.tensor(core)[None, :, None]
        keys, values = (torch.where(mask, *pair) for pair in zip(self.high, self.low, strict=True))
        return keys, values


@torch.no_grad()
def generate(model: Any, input_ids: Tensor, given: Given, settings: PackSettings, steps: int) -> list[PackStep]:
    """``steps`` greedy tokens for one prompt with an image; entry 0 is the prefill, entry t decode step t."""
    prompt = input_ids.flatten().tolist()
    images = [position for position, token in enumerate(prompt) if token == model.config.image_token_id]
    suffix = [position for position in range(images[0], len(prompt)) if position not in set(images)]
    language = model.model.language_model
    depth, count = len(language.layers), settings.core * len(images) // 100
    causal = torch.ones(len(prompt), len(prompt), dtype=torch.bool).tril()
    given = given.to(model.dtype) if isinstance(given, Tensor) else given
    logits, weights, cache = forward(model, [causal] * depth, prompt, given)
    position_ids = rope_positions(model, len(prompt), 0, given if not isinstance(given, Tensor) else {})[..., images]
    cos, sin = (each[0].double() for each in language.rotary_emb(torch.zeros(1, dtype=model.dtype), position_ids))
    layers = [_Layer(each.keys[0, :, images], each.values[0, :, images], cos, sin, settings) for each in cache.layers]
    importance = [each[suffix].mean(0)[images].numpy() for each in weights]

    def core_of(layer: int) -> tuple[int, ...]:
        return tuple(images[place] for place in top(importance[layer].tolist(), range(len(images)), count))

    cores = [core_of(layer) for layer in range(depth)]
    result = [PackStep(int(logits.argmax()), logits, cores)]
    for t in range(1, steps):
        for held, layer, core in zip(cache.layers, layers, cores, strict=True):
            keys, values = layer.mixed([position in core for position in images])
            held.keys[0, :, images], held.values[0, :, images] = keys, values
        visible = [torch.ones(1, len(prompt) + t, dtype=torch.bool)] * depth
        logits, weights, cache = forward(model, visible, [result[-1].token], given, cache)
        for index, each in enumerate(weights):
            share = settings.decay / 100
            importance[index] = share * importance[index] + (1 - share) * each[-1][images].numpy()
        cores = [core_of(layer) for layer in range(depth)]
        result.append(PackStep(int(logits.argmax()), logits, cores))
    return result
