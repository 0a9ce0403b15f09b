"""Temperature, top-k, top-p and min-p against a float64 reference and against transformers' own processors; what is
drawn against the same distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from avl_edge import Options
from avl_edge.model.sampling import Sampler, distribution
from tests.equipment.sampling_reference import is_decided, probabilities

# In eighths, so that there are equals, and so that no two are equal but for rounding.
LOGITS = st.lists(st.integers(-120, 120).map(lambda n: n / 8), min_size=1, max_size=60)
CHOICES = st.fixed_dictionaries(
    {
        "temperature": st.just(1.0) | st.floats(0.05, 5),
        "top_k": st.just(0) | st.integers(1, 70),
        "top_p": st.just(1.0) | st.floats(0.01, 1),
        "min_p": st.just(0.0) | st.floats(0, 1),
    }
)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
]


def _ours(logits: Any, **choices: Any) -> np.ndarray:
    """``[vocabulary]``, zero for what cannot be drawn."""
    ids, weights = distribution(torch.tensor(logits, dtype=torch.float32), Options(**choices))
    assert ids.tolist() == sorted(set(ids.tolist()))
    whole = np.zeros(len(logits))
    whole[ids.numpy()] = weights.double().numpy() / weights.double().numpy().sum()
    return whole


@settings(max_examples=400)
@given(logits=LOGITS, choices=CHOICES)
def test_the_distribution_is_that_of_float64(logits: list[float], choices: dict[str, Any]) -> None:
    assume(is_decided(logits, **choices))
    found, expected = _ours(logits, **choices), probabilities(logits, **choices)
    assert (found > 0).tolist() == (expected > 0).tolist()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@settings(max_examples=400)
@given(logits=LOGITS, choices=CHOICES)
def test_the_distribution_is_that_of_transformers(logits: list[float], choices: dict[str, Any]) -> None:
    assume(is_decided(logits, **choices))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(choices["temperature"]))])
    if choices["top_k"]:
        warpers.append(TopKLogitsWarper(choices["top_k"]))
    if choices["top_p"] < 1:
        warpers.append(TopPLogitsWarper(choices["top_p"]))
    if choices["min_p"]:
        warpers.append(MinPLogitsWarper(choices["min_p"]))
    scores = warpers(torch.zeros(1, 0, dtype=torch.int64), torch.tensor([logits], dtype=torch.float64))
    found, expected = _ours(logits, **choices), scores.softmax(-1)[0].numpy()
    # Which of several equals a nucleus takes is not defined there.
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=0, atol=1e-6)
    assert (found > 0).sum() == (expected > 0).sum()
    likelier = expected > expected[expected > 0].min() + 1e-9
    np.testing.assert_allclose(found[likelier], expected[likelier], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0])
@pytest.mark.parametrize("choices", [{"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 50, "top_p": 0.5}, {"min_p": 0.01}])
def test_large_vocabularies(spread: float, choices: dict[str, Any]) -> None:
    """Flat ones too, where a nucleus takes most of it."""
    logits = spread * np.random.default_rng(0).standard_normal(5000, np.float32)
    whole = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | choices
    found, expected = _ours(logits, **whole), probabilities(logits, **whole)
    # Near a border of the nucleus are many tokens: the last one may hang on rounding.
    assert np.abs(found - expected).sum() <= 1e-6 + 2 * expected[expected > 0].min()


@settings(max_examples=50)
@given(temperature=st.floats(0.05, 1), unlikely=st.floats(0, 100))
def test_no_token_is_lost_to_underflow(temperature: float, unlikely: float) -> None:
    found = _ours([0.0, -unlikely], temperature=temperature)
    assert found.all()
    np.testing.assert_allclose(found, probabilities([0.0, -unlikely], temperature=temperature), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.001, 100.0])
def test_the_ends_of_temperature(temperature: float) -> None:
    logits = [30.0, 29.99, -40.0, 29.995]
    expected = probabilities(logits, temperature=temperature)
    np.testing.assert_allclose(_ours(logits, temperature=temperature), expected, rtol=0, atol=3e-4)


def _close(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Pearson's test: the sum is within five deviations of what chance gives."""
    assert not counts[expected == 0].any()
    likely = expected > 0
    share = expected[likely] * counts.sum()
    chi = float(((counts[likely] - share) ** 2 / share).sum())
    freedom = int(likely.sum()) - 1
    return chi <= freedom + 5 * np.sqrt(2 * freedom)


LOGITS_12 = np.array([1.5, -0.5, 2.25, 0.0, 1.0, -2.0, 0.75, 2.0, -1.0, 0.25, 1.25, 0.5])


@pytest.mark.parametrize("choices", SETTINGS)
def test_draws_follow_the_distribution(choices: dict[str, Any]) -> None:
    sampler, logits = Sampler(Options(**{"temperature": 1.0, "seed": 11} | choices)), torch.tensor(LOGITS_12).float()
    counts = np.bincount([sampler(logits) for _ in range(6000)], minlength=len(LOGITS_12))
    assert _close(counts, probabilities(LOGITS_12, **choices))


def test_first_draws_of_seeds_in_a_row_follow_the_distribution() -> None:
    logits = torch.tensor(LOGITS_12).float()
    drawn = [Sampler(Options(temperature=1.0, seed=seed))(logits) for seed in range(4000)]
    assert _close(np.bincount(drawn, minlength=len(LOGITS_12)), probabilities(LOGITS_12))


@pytest.mark.parametrize("wrong", [{"temperature": 0.6**3}, {"temperature": 0.6, "top_p": 0.81}])
def test_the_test_of_draws_sees_other_distributions(wrong: dict[str, Any]) -> None:
    sampler, logits = Sampler(Options(temperature=0.6, top_p=0.9, seed=11)), torch.tensor(LOGITS_12).float()
    counts = np.bincount([sampler(logits) for _ in range(6000)], minlength=len(LOGITS_12))
    assert _close(counts, probabilities(LOGITS_12, temperature=0.6, top_p=0.9))
    expected = probabilities(LOGITS_12, **wrong)
    assert (counts[expected == 0] > 0).any() or not _close(counts, expected)
