"""What the decoder's layers read of prompts: one layer after the other, of the checkpoint as it is."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from ...attention.kernels import attend_prompt
from ...model.checkpoint import Weights
from ...model.network.decoder import DecoderLayer
from ...model.network.image_features import ImageFeatures
from ...model.network.layers import RmsNorm
from ...model.spec import ModelSpec
from ...model.vision_language import DeepStack, VisionLanguageModel
from ...request import Prompt
from .scaling import Recorder


class Calibration:
    """Holds each prompt's hidden states ``[tokens, hidden]`` in front of the next layer."""

    def __init__(self, spec: ModelSpec, weights: Weights, prompts: Sequence[Prompt]) -> None:
        model = VisionLanguageModel(spec, weights)
        self._spec, self._weights = spec.text, weights
        self._angles = [model.decoder.angles(torch.from_numpy(prompt.coordinates)) for prompt in prompts]
        self._hidden: list[Tensor] = []
        self._deep: list[DeepStack] = []
        for prompt in prompts:
            features = None if prompt.pixel_values is None else _finished(model.encode(prompt.pixel_values.pictures))
            self._hidden.append(model.embed(prompt.token_ids, prompt.spans, features))
            self._deep.append(DeepStack(prompt.spans, features, self._hidden[-1].device))

    def layer(self, name: str) -> Recorder:
        """Run the layer ``name``, which is the next one, and give what its linear layers read."""
        recorder = Recorder(self._weights, len(self._hidden))
        layer = DecoderLayer(self._spec, name, recorder)
        scale = self._spec.head_dim**-0.5
        for number, (hidden, angles) in enumerate(zip(self._hidden, self._angles, strict=True)):
            query, key, value = (part.transpose(0, 1) for part in layer.project(hidden, *angles))
            attended = attend_prompt(query, key, value, scale).transpose(0, 1)
            self._hidden[number] = layer.finish(hidden, attended)
            self._deep[number].add(self._hidden[number])
        return recorder

    def head(self, norm: str) -> Recorder:
        """What the head reads behind the last layer, from the norm of that name."""
        recorder = Recorder(self._weights, len(self._hidden))
        normed = RmsNorm.take(self._weights, norm, self._spec.hidden_size, self._spec.norm_eps)
        head = recorder.linear("head", self._spec.vocab_size, self._spec.hidden_size)
        for hidden in self._hidden:
            head(normed(hidden))
        return recorder


def _finished(encoding: Generator[None, None, ImageFeatures]) -> ImageFeatures:
    while True:
        try:
            next(encoding)
        except StopIteration as stop:
            features: ImageFeatures = stop.value
            return features
