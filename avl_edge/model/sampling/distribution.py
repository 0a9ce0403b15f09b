"""The distribution that a token is drawn from: temperature, then top-k, top-p and min-p, in transformers' order."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import Sampling


def distribution(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, ``[n]`` int64 in ascending order, and their weights, ``[n]`` float32, to which
    their probabilities are proportional, on the device of ``scores``.

    ``scores`` are finite logits, float32 ``[vocabulary]``, after bias and penalties; the temperature is above 0. The
    k-th likeliest token's equals stay with it, as in transformers. A nucleus (arXiv 1904.09751) is the fewest likeliest
    of these that together reach top_p of their mass; where equals are cut, the lowest ids stay. min-p: arXiv
    2407.01082.
    """
    if 0 < sampling.top_k < len(scores):
        ids = _places(scores >= scores.topk(sampling.top_k).values[-1])
        scores = scores[ids]
    else:
        ids = torch.arange(len(scores), device=scores.device)
    # The likeliest token weighs 1, the least likely ones 1e-38: below that, numbers are denormal, which is slow.
    weights = (scores - scores.max()).div_(sampling.temperature).clamp_(min=-87).exp_()
    mass = float(weights.sum())
    # All tokens below this together weigh less than what a nucleus leaves out, so that few are left to sort.
    least = max(sampling.min_p, (1 - sampling.top_p) * mass / len(weights))
    if least > 0:
        kept = _places(weights >= least)
        ids, weights = ids[kept], weights[kept]
    if sampling.top_p < 1:
        ordered, order = weights.sort(descending=True, stable=True)
        before = ordered.double().cumsum(0) - ordered
        # Back in the vocabulary's order: the last bits of two logits then do not change which one a draw falls on.
        kept = order[before < sampling.top_p * mass].sort().values
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _places(mask: Tensor) -> Tensor:
    """Where ``mask`` holds, int64."""
    return mask.nonzero().squeeze(1)
