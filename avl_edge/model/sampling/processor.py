"""What is changed in the logits before a token is chosen, at any temperature."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...config import Sampling


class LogitsProcessor:
    """The logit bias, then the repetition penalty, then the frequency and presence penalties of one request, of which
    ``prompt`` are the token ids.

    The repetition penalty (arXiv 1909.05858, section 4.1) is on the tokens of the prompt and the answer, as in
    transformers' `RepetitionPenaltyLogitsProcessor`; the others, which OpenAI's API defines, are on those of the answer
    alone.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int]) -> None:
        self._sampling = sampling
        bias = sampling.logit_bias
        self._biased = torch.tensor(list(bias), dtype=torch.int64)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        self._penalises = sampling.repetition_penalty != 1 or bool(
            sampling.frequency_penalty or sampling.presence_penalty
        )
        # How often each token is in the answer; those of the prompt alone are there with 0.
        self._counts = dict.fromkeys(prompt, 0) if sampling.repetition_penalty != 1 else {}

    @property
    def changes_logits(self) -> bool:
        """Whether it ever changes anything."""
        return self._penalises or len(self._biased) > 0

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        if self._penalises:
            self._counts[token] = self._counts.get(token, 0) + 1

    def __call__(self, logits: Tensor) -> Tensor:
        """float32 ``[vocabulary]`` to the same, on the same device, in a tensor of its own unless nothing changes."""
        if not self.changes_logits:
            return logits
        scores, device = logits.clone(), logits.device
        scores[self._biased.to(device)] += self._bias.to(device)
        if self._counts:
            options, ids = self._sampling, torch.tensor(list(self._counts), device=device)
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32, device=device)
            own = scores[ids]
            own = torch.where(own < 0, own * options.repetition_penalty, own / options.repetition_penalty)
            scores[ids] = own - options.frequency_penalty * counts - options.presence_penalty * (counts > 0)
        return scores
