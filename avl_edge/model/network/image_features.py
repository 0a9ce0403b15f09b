"""What a vision encoder makes of pictures."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...request import PixelValues


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Features ``[n, hidden]`` of pictures, one after the other: ``tokens`` stand in the places of the prompt's image
    tokens, and ``deep[i]`` is added to what leaves the decoder's layer ``i`` there (DeepStack, arXiv 2406.04334)."""

    tokens: Tensor
    deep: tuple[Tensor, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Those of several pictures, one or more."""
        if len(parts) == 1:
            return parts[0]
        deep = zip(*(part.deep for part in parts), strict=True)
        return cls(torch.cat([part.tokens for part in parts]), tuple(torch.cat(each) for each in deep))

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.tokens, *self.deep))


class VisionEncoder(Protocol):
    """A family's vision encoder with all that makes its output the decoder's input."""

    def run(self, pixels: PixelValues, like: Tensor) -> Generator[None, None, ImageFeatures]:
        """The features of one picture; stops between two layers. ``like``: a tensor on the model's device, in its
        dtype."""
        ...
