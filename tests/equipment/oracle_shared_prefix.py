"""A question about a picture whose rows were packed before it was asked, on transformers' own LLaVA.

As :mod:`tests.equipment.oracle_formats`, but for the prompt: everything up to the end of the last image runs by itself,
over rows as they were computed, and is then stored, each row in its tier's format. The question runs after that and
attends the stored rows as they are read back, and its own as they were computed. Only then are its own stored. With
exact rows it is the same as running the whole prompt at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, LlavaForConditionalGeneration

from tests.equipment import oracle_formats
from tests.equipment.oracle_formats import Layer, Oracle

NAME = "shared_rows_oracle"


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    layer: Layer = module.oracle
    if layer.attended:
        return oracle_formats.attention(module, query, key, value, mask, scaling, **options)
    queries, count = query[0], query.shape[2]
    keys, values = (each[0, :, -count:].transpose(0, 1) for each in (key, value))
    first = not len(layer.keys)
    layer.keys, layer.values, layer.coarse_keys = (
        new.clone() if first else torch.cat([old, new])
        for old, new in ((layer.keys, keys), (layer.values, values), (layer.coarse_keys, keys))
    )
    length = len(layer.keys)
    group = len(queries) // keys.shape[1]
    repeated = [rows.transpose(0, 1).repeat_interleave(group, 0) for rows in (layer.keys, layer.values)]
    logits = (queries @ repeated[0].transpose(1, 2)) * scaling
    hidden = ~torch.ones(count, length, dtype=torch.bool).tril(length - count)
    if not first:
        hidden[:, layer.dropped] = True
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    before = torch.zeros(length - count, length, dtype=weights.dtype)
    if not first:
        before[:, : length - count] = layer.weights
    layer.weights = torch.cat([before, weights.mean(0)])
    return (weights @ repeated[1]).transpose(0, 1)[None], None


AttentionInterface.register(NAME, _attention)


def load_model(directory: Path) -> LlavaForConditionalGeneration:
    """The checkpoint in float64, its language model with the attention above."""
    implementation = {"text_config": NAME, "vision_config": "sdpa"}
    return LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation=implementation).double().eval()


class PrefixOracle(Oracle):
    """One question. ``formats`` hold for the picture before it is asked, and for its own text from its end on; of the
    picture's image rows, ``share`` percent are stored, those whose values stand out, and nobody sees the others."""

    share = 100

    def _by_values(self, layer: Layer, secondary: int) -> list[int]:  # noqa: ARG002
        return [place for place in self.images if place not in layer.dropped]

    def _prefill(self, visible: list[Tensor]) -> tuple[Tensor, Any]:
        assert all(bool(seen.tril().eq(seen).all()) for seen in visible), "nothing is pruned of a shared picture"
        self.layers = [Layer(text_format=self.formats.text) for _ in self.modules]
        for module, layer in zip(self.modules, self.layers, strict=True):
            module.oracle = layer
        end = self.images[-1] + 1
        picture = self.model(input_ids=torch.tensor([self.prompt[:end]]), pixel_values=self.pixels, use_cache=True)
        for layer in self.layers:
            self._smooth(layer, list(range(end)), end + 1024)
            layer.store(self.system + [place for place in self.text if place < end], self.formats.text)
            stored = super()._by_values(layer, self.share)
            layer.dropped = sorted(set(self.images) - set(stored))
            layer.store(stored, self.formats.core)
        out = self.model(
            input_ids=torch.tensor([self.prompt[end:]]),
            position_ids=torch.arange(end, len(self.prompt))[None],
            past_key_values=picture.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[0, -1], out.past_key_values

    def _store_prompt(self, steps: int) -> None:  # noqa: ARG002
        end = self.images[-1] + 1
        for layer in self.layers:
            layer.store([place for place in self.text if place >= end], self.formats.text)
