"""How far a method's predictions are from full attention's, before a single token differs.

Full attention's answer is given to the method token by token, and at each token the two next-token distributions are
compared. It is run on the torch backend, the oracle of the others: this is a figure of the method, not of a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ...backends.cpu.backend import TorchBackend
from ...backends.decode_loop import DecodeLoop
from ...model.checkpoint import load_weights
from ...model.network.image_features import ImageFeatures
from ...model.vision_language import VisionLanguageModel
from ...model.weight_format import WeightFormats
from ...serving.requests import Request
from ...serving.runtime import Runtime
from .settings import Setting


class Divergence:
    """The model of ``runtime``, whose directory is ``model``, beside it, its decoder ``packed`` likewise (plain weights
    are mapped, not read twice)."""

    def __init__(self, runtime: Runtime, model: Path, packed: WeightFormats) -> None:
        self._model = VisionLanguageModel(runtime.spec, load_weights(model, None, runtime.spec.prefixes, packed))

    def from_full(
        self, full: Request, token_ids: Sequence[int], requests: Mapping[Setting, Request]
    ) -> dict[Setting, float]:
        """For each of ``requests`` the mean KL per token, in nats, to ``full``, whose answer is ``token_ids``.

        All are requests about the same picture.
        """
        features = self.encode(full)
        expected = self.log_probabilities(full, features, token_ids)
        return {
            setting: kl_per_token(expected, self.log_probabilities(request, features, token_ids))
            for setting, request in requests.items()
        }

    def encode(self, request: Request) -> ImageFeatures | None:
        """The features of a request's pictures; None without pictures."""
        return DecodeLoop(TorchBackend.with_pages(self._model, 0)).encode(request.prompt)

    def log_probabilities(self, request: Request, features: ImageFeatures | None, token_ids: Sequence[int]) -> Tensor:
        """Of ``request`` answered by ``token_ids``, at most its ``max_new_tokens``: float32 ``[tokens, vocabulary]``.

        Row ``i`` is what the model expected in the place of token ``i``.
        """
        prompt, plan = request.prompt, request.plan
        loop = DecodeLoop(TorchBackend.with_pages(self._model, plan.pages))
        logits = [loop.prefill(prompt, features, plan)]
        logits += [loop.decode([token])[0] for token in token_ids[:-1]]
        return functional.log_softmax(torch.stack(logits).float(), dim=-1)


def kl_per_token(full: Tensor, other: Tensor) -> float:
    """The mean over tokens of KL(full || other) in nats; both are log-probabilities ``[tokens, vocabulary]``."""
    return max(float(functional.kl_div(other, full, reduction="batchmean", log_target=True)), 0.0)
