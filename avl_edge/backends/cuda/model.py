"""The networks with their weights on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.checkpoint import Weights
from ...model.spec import ModelSpec
from ...model.vision_language import VisionLanguageModel
from ...model.weights import LinearWeight


class DeviceWeights(Weights):
    """Each tensor goes to the device when a layer takes it; the mapped file never is in memory twice as a whole."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._weights = weights
        self._device = device
        self.dtype = weights.dtype

    def take(self, name: str, *shape: int) -> Tensor:
        return self._weights.take(name, *shape).to(self._device)

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool = False) -> LinearWeight:
        return self._weights.linear(name, outputs, inputs, bias=bias).to(self._device)

    def has(self, layer: str) -> bool:
        return self._weights.has(layer)

    def deny(self, name: str) -> None:
        self._weights.deny(name)


def load_model(spec: ModelSpec, weights: Weights, device: torch.device) -> VisionLanguageModel:
    """The model on ``device``, tensor by tensor."""
    with device:  # tables that layers derive, like RoPE's frequencies
        return VisionLanguageModel(spec, DeviceWeights(weights, device))
