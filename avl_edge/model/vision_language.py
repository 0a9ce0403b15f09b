"""A vision-language model of any family: its vision encoder, its decoder, and how the one's features enter the
other."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from ..request import ImageSpan, PixelValues
from .checkpoint import Weights
from .families import network_of
from .network.decoder import Decoder
from .network.image_features import ImageFeatures, VisionEncoder
from .spec import ModelSpec


class VisionLanguageModel:
    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.spec = spec
        if spec.has_own_names:
            weights = weights.renamed(network_of(spec).renamed)
        self.dtype = weights.dtype
        self.decoder = Decoder(spec.text, weights)
        self._encoder: VisionEncoder = network_of(spec).VisionEncoder(spec, weights)

    def encode(self, pictures: Sequence[PixelValues]) -> Generator[None, None, ImageFeatures]:
        """The features of one or more pictures, one after the other; stops between two layers of the vision
        encoder."""
        encoded = []
        for index, picture in enumerate(pictures):
            if index:
                yield
            encoded.append((yield from self._encoder.run(picture, self.decoder.embedding)))
        return ImageFeatures.joined(encoded)

    def embed(self, token_ids: tuple[int, ...], spans: tuple[ImageSpan, ...], features: ImageFeatures | None) -> Tensor:
        """The prompt's embeddings ``[n, hidden]``, image features in place of their placeholders."""
        device = self.decoder.embedding.device
        embedded = self.decoder.embed(torch.tensor(token_ids, device=device))
        if spans:
            assert features is not None
            embedded[image_places(spans, device)] = features.tokens
        return embedded


class DeepStack:
    """Features that are added to the hidden states of early layers (see :class:`ImageFeatures`), for a prompt whose
    tokens may become fewer on the way."""

    def __init__(self, spans: tuple[ImageSpan, ...], features: ImageFeatures | None, device: torch.device) -> None:
        self._deep = list(features.deep) if features else []
        self._places = image_places(spans if self._deep else (), device)

    def add(self, hidden: Tensor) -> None:
        """Add the features of the layer that ``hidden`` ``[n, size]`` comes from, asked in the order of layers."""
        if self._deep:
            hidden[self._places] += self._deep.pop(0)

    def keep(self, survivors: Tensor) -> None:
        """From now on there are only these of the tokens: int64 indices, ascending."""
        if self._deep:
            stay = torch.isin(self._places, survivors)
            self._places = torch.searchsorted(survivors, self._places[stay])
            self._deep = [each[stay] for each in self._deep]


def image_places(spans: Sequence[ImageSpan], device: torch.device) -> Tensor:
    """The places of all image tokens in the prompt, int64 ``[n]``."""
    places = [torch.arange(span.start, span.start + span.length) for span in spans]
    return torch.cat(places).to(device) if places else torch.empty(0, dtype=torch.int64, device=device)
