"""One request's sampler: bias and penalties, seeds, what is greedy, log-probabilities, logits that are no numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from avl_edge import BadInput, Options
from avl_edge.errors import InvalidLogits
from avl_edge.model.sampling import LogitsProcessor, Sampler
from tests.equipment.sampling_reference import log_softmax, processed

VOCABULARY = 12
TOKEN = st.integers(0, VOCABULARY - 1)
TOKENS = st.lists(TOKEN, max_size=20)
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=VOCABULARY, max_size=VOCABULARY)
BIAS = st.dictionaries(TOKEN, st.floats(-100, 100), max_size=4)


def _ours(logits: list[float], prompt: list[int], answer: list[int], **options: Any) -> np.ndarray:
    processor = LogitsProcessor(Options(**options), prompt)
    for token in answer:
        processor.add(token)
    given_logits = torch.tensor(logits)
    found = processor(given_logits).numpy()
    assert given_logits.tolist() == torch.tensor(logits).tolist(), "they may be a view of others' too"
    return found


@given(
    logits=LOGITS,
    prompt=TOKENS,
    answer=TOKENS,
    options=st.fixed_dictionaries(
        {},
        optional={
            "logit_bias": BIAS,
            "repetition_penalty": st.floats(0.1, 10),
            "frequency_penalty": st.floats(-2, 2),
            "presence_penalty": st.floats(-2, 2),
        },
    ),
)
def test_bias_and_penalties(logits: list[float], prompt: list[int], answer: list[int], options: dict[str, Any]) -> None:
    expected = processed(logits, prompt, answer, **options)
    np.testing.assert_allclose(_ours(logits, prompt, answer, **options), expected, rtol=1e-5, atol=1e-4)


@given(logits=LOGITS, prompt=TOKENS, answer=TOKENS, bias=BIAS, penalty=st.floats(0.1, 10))
def test_bias_and_repetition_penalty_are_those_of_transformers(
    logits: list[float], prompt: list[int], answer: list[int], bias: dict[int, float], penalty: float
) -> None:
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    if bias:
        processors.insert(0, SequenceBiasLogitsProcessor([[[token], float(each)] for token, each in bias.items()]))
    expected = processors(torch.tensor([prompt + answer], dtype=torch.int64), torch.tensor([logits]))[0]
    found = _ours(logits, prompt, answer, logit_bias=bias, repetition_penalty=penalty)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_a_sampler_counts_its_own_tokens() -> None:
    """The likeliest by turns, as each falls behind by half of what parts it from the next."""
    sampler = Sampler(Options(frequency_penalty=1.0, presence_penalty=0.5), prompt=[0, 1, 2])
    logits = torch.tensor([5.0, 4.75, 4.0])
    answer: list[int] = []
    for _ in range(12):
        expected = processed(logits.tolist(), [0, 1, 2], answer, frequency_penalty=1.0, presence_penalty=0.5)
        answer.append(sampler(logits))
        assert answer[-1] == int(expected.argmax())
    assert set(answer) == {0, 1, 2}


def test_the_penalty_of_repetition_knows_the_prompt() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0])
    assert Sampler(Options(repetition_penalty=2.0), prompt=[0])(logits) == 1
    assert Sampler(Options(repetition_penalty=2.0), prompt=[1])(logits) == 0
    assert Sampler(Options(frequency_penalty=2.0, presence_penalty=2.0), prompt=[0])(logits) == 0


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.5, "seed": 3, "stop": "x"}, True),
        ({"temperature": 0.5}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"presence_penalty": -0.1}, False),
        ({"logprobs": 0}, False),
    ],
)
def test_what_is_greedy_needs_no_logits(options: dict[str, Any], greedy: bool) -> None:
    assert Sampler(Options(**options)).greedy == greedy


class TestSeeds:
    LOGITS = torch.zeros(1000)

    def _draw(self, sampler: Sampler, count: int = 20) -> list[int]:
        return [sampler(self.LOGITS) for _ in range(count)]

    def test_a_seed_repeats_whatever_runs_beside_it(self) -> None:
        options, other = Options(temperature=1.0, seed=5), Sampler(Options(temperature=1.0, top_k=3, seed=6))
        alone, sampler = self._draw(Sampler(options)), Sampler(options)
        beside = []
        for _ in range(20):
            torch.rand(3)
            other(self.LOGITS)
            beside.append(sampler(self.LOGITS))
        assert beside == alone
        assert self._draw(Sampler(Options(temperature=1.0, seed=6))) != alone

    def test_without_one_each_request_draws_its_own_and_says_it(self) -> None:
        samplers = [Sampler(Options(temperature=1.0)) for _ in range(20)]
        assert len({sampler.seed for sampler in samplers}) == 20
        for sampler in samplers:
            again = Sampler(Options(temperature=1.0, seed=sampler.seed))
            assert self._draw(sampler) == self._draw(again)
            assert sampler.seed is not None
            assert int(float(sampler.seed)) == sampler.seed, "a reader of JSON keeps it"

    def test_nothing_is_drawn_at_temperature_0(self) -> None:
        assert Sampler(Options(seed=5)).seed is None
        assert Sampler(Options(frequency_penalty=1.0)).seed is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}, {"frequency_penalty": 1.0, "logprobs": 1}])
def test_logits_that_are_no_numbers(dtype: torch.dtype, bad: float, options: dict[str, Any]) -> None:
    sampler, logits = Sampler(Options(**options)), torch.tensor([0.0, 1.0, 3.0, 0.5], dtype=dtype)
    again = Sampler(Options(**options))
    first = sampler(logits)
    for place in range(4):
        broken = logits.clone()
        broken[place] = bad
        with pytest.raises(InvalidLogits, match="the model gave NaN or infinite logits"):
            sampler(broken)
    assert [first, sampler(logits)] == [again(logits), again(logits)], "a failure leaves the sampler as it was"


@given(logits=LOGITS, temperature=st.sampled_from([0.0, 0.7]), bias=BIAS, count=st.integers(0, 15))
def test_logprobs_are_the_models_own(
    logits: list[float], temperature: float, bias: dict[int, float], count: int
) -> None:
    options = Options(temperature=temperature, top_k=3, logit_bias=bias, repetition_penalty=1.5, logprobs=count, seed=1)
    sampler = Sampler(options, prompt=[1, 2])
    token, expected = sampler(torch.tensor(logits)), log_softmax(logits)
    found = sampler.logprobs
    assert found is not None
    assert found.token_id == token
    assert found.logprob == pytest.approx(expected[token], abs=1e-6)
    assert len({each.token_id for each in found.top}) == len(found.top) == min(count, VOCABULARY)
    for each, likely in zip(found.top, np.sort(expected)[::-1], strict=False):
        assert each.logprob == pytest.approx(likely, abs=1e-6)
        assert each.logprob == pytest.approx(expected[each.token_id], abs=1e-6)


def test_no_logprobs_unless_asked_for() -> None:
    sampler = Sampler(Options(temperature=1.0))
    sampler(torch.zeros(3))
    assert sampler.logprobs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number from 0 to 100"),
        ({"temperature": 1e-4}, "temperature must be 0, or a number from 0.001 to 100"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": "1"}, "temperature must be a number"),
        ({"temperature": 10**5000}, "temperature must be a number"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p must be a number from 0 to 1"),
        ({"top_k": -1}, "top_k must be a whole number from 0"),
        ({"top_k": 2.0}, "top_k must be a whole number from 0"),
        ({"top_k": None}, "top_k must be a whole number from 0"),
        ({"min_p": 1.5}, "min_p must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.01 to 100"),
        ({"frequency_penalty": 2.5}, "frequency_penalty must be a number from -2 to 2"),
        ({"presence_penalty": -2.5}, "presence_penalty must be a number from -2 to 2"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**63}, "seed must be a whole number from 0"),
        ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20"),
        ({"logprobs": True}, "logprobs must be a whole number"),
        ({"logit_bias": [3]}, "logit_bias must be a mapping"),
        ({"logit_bias": {"3": 1}}, "a token id of logit_bias must be a whole number"),
        ({"logit_bias": {-3: 1}}, "a token id of logit_bias must be a whole number"),
        ({"logit_bias": {3: 101}}, "the logit_bias of token 3 must be a number from -100 to 100"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "at most 1024 tokens"),
        ({"stop": 3}, "stop must be strings, not int"),
        ({"stop": [3]}, "a stop string must be a string, not int"),
        ({"stop": b"x"}, "a stop string must be a string, not int"),
        ({"stop": ["x", ""]}, "1 to 256 characters"),
        ({"stop": "x" * 257}, "1 to 256 characters"),
        ({"stop": ["x"] * 17}, "at most 16 strings"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        Options(**options)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 120


def test_stop_is_one_string_or_several() -> None:
    assert Options(stop="ab").stop_strings == ("ab",)
    assert Options(stop=["ab", "c"]).stop_strings == ("ab", "c")
    assert Options().stop_strings == ()
