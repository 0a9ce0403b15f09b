"""A LLaVA in any size whose weights are drawn at random: what is measured does not depend on them."""

from __future__ import annotations

import torch
from torch import Tensor

from avl_edge.model.checkpoint import Weights
from avl_edge.model.clip_config import ClipSpec
from avl_edge.model.families.llava import LlavaSpec
from avl_edge.model.spec import TextSpec

CPU = torch.device("cpu")


def random_spec(layers: int, hidden: int, inner: int, heads: int, vocabulary: int) -> LlavaSpec:
    """A decoder like LLaVA-1.5's, with a vision tower of a few numbers: prompts come with random features."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = (hidden, inner, layers, heads, heads, hidden // heads)
    text = TextSpec(*sizes, "silu", 1e-5, vocabulary, 4096, False, False, False, False, rope)
    return LlavaSpec(text, 0, ClipSpec(8, 8, 1, 1, 28, 14, "gelu", 1e-5), (0,), True, "gelu", True)


class RandomWeights(Weights):
    """Draws each tensor on the device when it is asked for, at a scale that keeps activations finite.

    ``bytes`` of those that were drawn for the decoder and its head: of the vision tower a decode step reads none.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device = CPU) -> None:
        super().__init__({})
        self.dtype = dtype
        self.bytes = 0
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def take(self, name: str, *shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=self.dtype, device=self._device)
        self.bytes += drawn.nbytes if name.startswith(("text.", "head.")) else 0
        if name.endswith("norm.weight"):
            return drawn.fill_(1)
        return drawn.normal_(generator=self._generator).mul_(shape[-1] ** -0.5)

    def deny(self, name: str) -> None:
        """Nothing is stored, so nothing is there too many."""
