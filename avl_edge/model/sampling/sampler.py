"""One request's choice of tokens."""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...config import Sampling
from ...errors import InvalidLogits
from ...request import Logprobs, TokenLogprob
from .distribution import distribution
from .processor import LogitsProcessor


class Matcher(Protocol):
    """Which tokens may come next: asked for :meth:`allowed`, ascending int64 ids and at least one, then told."""

    def allowed(self) -> npt.NDArray[np.int64]: ...

    def accept(self, token: int) -> None: ...


class Sampler:
    """Chooses the tokens of one request, of which ``prompt`` are the token ids: the likeliest at temperature 0, else
    drawn, one random number a token, so that a seed gives the same draws whatever else runs.

    ``seed`` is that of the draws: the request's, or one from the system; None where nothing is drawn. ``logprobs`` are
    those of the newest token, where the request asks for them.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = (), matcher: Matcher | None = None) -> None:
        """``matcher`` says which tokens may come."""
        self._matcher = matcher
        self._sampling = sampling
        self._processor = LogitsProcessor(sampling, prompt)
        self.seed: int | None = None
        if sampling.temperature > 0:
            # A drawn seed stays below 2^53, so that every reader of JSON keeps it exactly.
            self.seed = secrets.randbits(53) if sampling.seed is None else sampling.seed
        self._random = random.Random(self.seed)
        self.logprobs: Logprobs | None = None

    @property
    def greedy(self) -> bool:
        """Whether the model's likeliest token is all that is asked for, so that nobody needs to see the logits."""
        unchanged = not self._processor.changes_logits
        is_free = unchanged and self._matcher is None
        return self._sampling.temperature == 0 and is_free and self._sampling.logprobs is None

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> int:
        """``[vocabulary]`` in any float dtype to an id, which counts as the answer's next token. The work is done on
        the device of ``logits``.

        Raises :class:`InvalidLogits` for a NaN or an infinity among them; nothing has changed then.
        """
        logits = logits.float()
        scores = self._processor(logits)
        lowest, highest = torch.stack(torch.aminmax(scores)).tolist()  # both are NaN where any is
        if not math.isfinite(highest - lowest):
            raise InvalidLogits(
                "the model gave NaN or infinite logits: its weights are damaged, or too large for their dtype; copy "
                "the checkpoint again, or store it in bfloat16 or float32"
            )
        token = self._choose(scores) if self._matcher is None else self._choose_allowed(scores, self._matcher)
        self._processor.add(token)
        if self._sampling.logprobs is not None:
            self.logprobs = _logprobs(logits, token, self._sampling.logprobs)
        return token

    def _choose(self, scores: Tensor) -> int:
        return int(scores.argmax()) if self._sampling.temperature == 0 else self._draw(scores)

    def _choose_allowed(self, scores: Tensor, matcher: Matcher) -> int:
        ids = matcher.allowed()
        token = int(ids[self._choose(scores[torch.from_numpy(ids).to(scores.device)])])
        matcher.accept(token)
        return token

    def _draw(self, scores: Tensor) -> int:
        """By the inverse of the cumulative distribution, which is summed in float64: a sum in float32 would lose tokens
        that together may be likely."""
        ids, weights = distribution(scores, self._sampling)
        cumulative = weights.double().cumsum_(0)
        total = float(cumulative[-1])
        # The product may round up to the total, which is beyond the last token.
        point = min(self._random.random() * total, math.nextafter(total, 0))
        return int(ids[torch.searchsorted(cumulative, point, right=True)])


def _logprobs(logits: Tensor, token: int, count: int) -> Logprobs:
    highest = float(logits.max())
    total = highest + math.log((logits - highest).exp_().sum())
    values, ids = logits.topk(min(count, len(logits)))
    top = (TokenLogprob(each, value - total) for each, value in zip(ids.tolist(), values.tolist(), strict=True))
    return Logprobs(token, float(logits[token]) - total, tuple(top))
