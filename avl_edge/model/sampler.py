"""From logits to a token id."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Options


class Sampler:
    """One request's choice of tokens: greedy at temperature 0, else top-p sampling from its own seed."""

    def __init__(self, options: Options) -> None:
        self.greedy = options.temperature == 0
        self._temperature = options.temperature
        self._top_p = options.top_p
        self._generator = torch.Generator().manual_seed(options.seed)

    def __call__(self, logits: Tensor) -> int:
        """``[vocabulary]`` in any float dtype to an id."""
        if self.greedy:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.float() / self._temperature, dim=-1)
        ordered, ids = probabilities.sort(descending=True)
        # The nucleus (arXiv 1904.09751): the fewest likeliest tokens that together reach top_p.
        ordered[ordered.cumsum(-1) - ordered >= self._top_p] = 0
        return int(ids[torch.multinomial(ordered, 1, generator=self._generator)])
