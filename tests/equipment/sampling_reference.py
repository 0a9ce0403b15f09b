"""What the options of sampling mean, in float64 and plain loops: from the definitions of transformers and OpenAI's API,
with none of the package's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def processed(
    logits: Sequence[float] | Floats,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> Floats:
    """``[vocabulary]`` after bias and penalties."""
    scores = np.array(logits, np.float64)
    for token, bias in (logit_bias or {}).items():
        scores[token] += bias
    for token in {*prompt, *answer}:
        scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
    for token in set(answer):
        scores[token] -= answer.count(token) * frequency_penalty + presence_penalty
    return scores


def probabilities(
    scores: Sequence[float] | Floats,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Floats:
    """``[vocabulary]``; of equally likely tokens a nucleus takes the lowest ids first."""
    scaled = np.array(scores, np.float64) / temperature
    if top_k:
        kth = np.sort(scaled)[::-1][min(top_k, len(scaled)) - 1]
        scaled[scaled < kth] = -np.inf
    likely = _softmax(scaled)
    before, nucleus = 0.0, np.zeros(len(likely), bool)
    for token in sorted(range(len(likely)), key=lambda token: (-likely[token], token)):
        nucleus[token] = before < top_p or top_p == 1
        before += likely[token]
    likely[~nucleus] = 0
    likely[likely < min_p * likely.max()] = 0
    return likely / likely.sum()


def is_decided(scores: Sequence[float] | Floats, *, temperature: float, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether the survivors do not hang on the last bits: no border of the nucleus or of min-p is within 1e-6."""
    likely = probabilities(scores, temperature=temperature, top_k=top_k)
    before = np.concatenate([[0], np.sort(likely)[::-1].cumsum()])
    nucleus = top_p == 1 or np.abs(before - top_p).min() > 1e-6
    ratios = likely[(likely > 0) & (likely < likely.max())] / likely.max()
    return bool(nucleus and np.all(np.abs(ratios - min_p) > 1e-6))


def log_softmax(logits: Sequence[float] | Floats) -> Floats:
    """``[vocabulary]``."""
    return np.log(_softmax(np.array(logits, np.float64)))


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())
