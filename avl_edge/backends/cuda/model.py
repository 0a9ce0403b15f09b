"""The networks with their weights on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.checkpoint import Weights
from ...model.network import Llava
from ...model.spec import ModelSpec
from ...model.weights import LinearWeight
from ...request import ImageSpan


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

    def packs(self, name: str) -> bool:
        return self._weights.packs(name)

    def deny(self, name: str) -> None:
        self._weights.deny(name)


class DeviceLlava(Llava):
    """The token ids that a prompt brings from the CPU go to where the weights are, as its pixels do."""

    def embed(self, token_ids: tuple[int, ...], spans: tuple[ImageSpan, ...], features: Tensor | None) -> Tensor:
        with self.decoder.embedding.device:
            return super().embed(token_ids, spans, features)


def load_model(spec: ModelSpec, weights: Weights, device: torch.device) -> Llava:
    """The model on ``device``, tensor by tensor."""
    with device:  # tables that layers derive, like RoPE's frequencies
        return DeviceLlava(spec, DeviceWeights(weights, device))
