"""How requests choose their tokens and end, through the runtime: each by its own options, in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from avl_edge import BadInput, Options, Runtime
from avl_edge.backends.step_batch import StepResult
from avl_edge.errors import InvalidLogits
from avl_edge.model.network.decoder import Decoder
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.pixels import stacked
from tests.equipment.recorder import Recorder
from tests.equipment.sampling_reference import log_softmax, processed

IMAGE = random_image(3, (120, 80))
PROMPT = "Describe the picture in detail."


@pytest.fixture(scope="module")
def directory(checkpoint: Checkpoints) -> Path:
    return checkpoint("mistral-gqa")


@pytest.fixture
def runtime(directory: Path) -> Runtime:
    return Runtime.load(directory)


def _options(**options: Any) -> Options:
    return Options(**{"max_new_tokens": 24} | options)


@pytest.mark.parametrize("bias", [False, True])
def test_greedy_tokens_with_penalties_are_those_of_transformers(runtime: Runtime, directory: Path, bias: bool) -> None:
    likely = runtime.generate([IMAGE], PROMPT, _options()).result().token_ids[0]
    biases = {likely: -4.0, 40: 1.5} if bias else {}
    request = runtime.prepare([IMAGE], PROMPT, _options(repetition_penalty=1.3, logit_bias=biases))
    found, prompt = runtime.submit(request).result().token_ids, request.prompt
    model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    ids = torch.tensor([prompt.token_ids])
    more: dict[str, Any] = {"sequence_bias": [[[token], each] for token, each in biases.items()]} if bias else {}
    expected = model.generate(
        input_ids=ids,
        pixel_values=torch.from_numpy(stacked(prompt)),
        max_new_tokens=24,
        do_sample=False,
        repetition_penalty=1.3,
        **more,
    )
    assert list(found) == expected[0, ids.shape[1] :].tolist()


def test_frequency_and_presence_penalties_are_on_the_answer_alone(runtime: Runtime) -> None:
    record = Recorder(runtime)
    penalties: dict[str, Any] = {"frequency_penalty": 0.9, "presence_penalty": 0.6, "repetition_penalty": 1.2}
    result = runtime.generate([IMAGE], PROMPT, _options(**penalties)).result()
    prompt = runtime.prepare([IMAGE], PROMPT).prompt.token_ids
    for step, (token, logits) in enumerate(zip(result.token_ids, record.logits, strict=True)):
        expected = processed(logits.tolist(), prompt, result.token_ids[:step], **penalties)
        assert token == int(expected.argmax())


def test_sampled_requests_do_not_depend_on_their_company(runtime: Runtime) -> None:
    every = [
        _options(temperature=1.0, seed=1),
        _options(temperature=1.0, seed=2, top_p=0.8),
        _options(),
        _options(temperature=1.5, seed=1, frequency_penalty=0.5, logprobs=1),
    ]
    alone = [runtime.generate([IMAGE], PROMPT, options).result() for options in every]
    assert len({each.token_ids for each in alone}) == 4
    together = [runtime.generate([IMAGE], PROMPT, options) for options in every]
    for generation, expected in zip(together, alone, strict=True):
        result = generation.result()
        assert (result.token_ids, result.seed) == (expected.token_ids, expected.seed)
        for found, alone_found in zip(result.logprobs or (), expected.logprobs or (), strict=True):
            assert found.logprob == pytest.approx(alone_found.logprob, abs=1e-4)


def test_requests_without_a_seed_draw_differently_and_say_how(runtime: Runtime) -> None:
    running = [runtime.generate([IMAGE], PROMPT, _options(temperature=1.5)) for _ in range(3)]
    results = [generation.result() for generation in running]
    assert len({each.token_ids for each in results}) == len({each.seed for each in results}) == 3
    again = runtime.generate([IMAGE], PROMPT, _options(temperature=1.5, seed=results[1].seed)).result()
    assert (again.token_ids, again.seed) == (results[1].token_ids, results[1].seed)


def test_greedy_requests_are_chosen_where_the_logits_are(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of requests that take the likeliest token asks for tokens; one that asks for log-probabilities, for
    logits."""
    backend = runtime.debug.backend
    assert backend is not None
    asked, decode = list[bool](), backend.decode

    def watched(*arguments: Any, greedy: bool = False) -> StepResult:
        asked.append(greedy)
        return decode(*arguments, greedy=greedy)

    monkeypatch.setattr(backend, "decode", watched)
    expected = runtime.generate([IMAGE], PROMPT, _options(logprobs=0)).result()
    assert not any(asked)
    asked.clear()
    options = _options(stop="never said", top_k=3, top_p=0.5, min_p=0.1, seed=3)
    assert runtime.generate([IMAGE], PROMPT, options).result().token_ids == expected.token_ids
    assert asked
    assert all(asked)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_the_models_logits(runtime: Runtime, temperature: float) -> None:
    record = Recorder(runtime)
    options = _options(temperature=temperature, top_k=2, seed=1, logit_bias={5: 8.0}, logprobs=2)
    generation = runtime.generate([IMAGE], PROMPT, options)
    events = list(generation)
    result = generation.result()
    assert result.logprobs == tuple(event.logprobs for event in events)
    for event, logits in zip(events, record.logits, strict=True):
        expected = log_softmax(logits.tolist())
        assert event.logprobs is not None
        assert event.logprobs.token_id == event.token_id
        assert event.logprobs.logprob == pytest.approx(expected[event.token_id], abs=1e-6)
        assert [each.token_id for each in event.logprobs.top] == expected.argsort()[::-1][:2].tolist()
    assert runtime.generate([IMAGE], PROMPT, _options()).result().logprobs is None


def test_an_answer_ends_before_its_stop_string(runtime: Runtime) -> None:
    whole = runtime.generate([IMAGE], PROMPT, _options()).result()
    for begin in range(0, len(whole.text) - 3, 5):
        stop = whole.text[begin : begin + 3]
        generation = runtime.generate([IMAGE], PROMPT, _options(stop=["not in it", stop]))
        events = list(generation)
        result = generation.result()
        assert result.text == "".join(event.text for event in events) == whole.text[: whole.text.index(stop)]
        assert (result.finish_reason, result.stop_string) == ("stop", stop)
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]
        assert result.token_ids == whole.token_ids[: len(events)]
    assert runtime.kv_bytes_in_use == 0


def test_text_that_may_become_a_stop_string_is_let_go_of_at_the_limit(runtime: Runtime) -> None:
    whole = runtime.generate([IMAGE], PROMPT, _options()).result()
    result = runtime.generate([IMAGE], PROMPT, _options(stop=whole.text[-2:] + "more")).result()
    assert (result.text, result.finish_reason, result.stop_string) == (whole.text, "length", None)
    result = runtime.generate([IMAGE], PROMPT, _options(stop=whole.text[-2:] + "more", max_new_tokens=23)).result()
    assert whole.text.startswith(result.text)
    result = runtime.generate([IMAGE], PROMPT, _options(stop=whole.text[-1:])).result()
    assert (result.finish_reason, result.stop_string) == ("stop", whole.text[-1:])


def test_what_the_limit_lets_go_of_may_complete_a_stop_string(runtime: Runtime) -> None:
    """Half a character is no text before the end."""
    half = 3 + 0xF0  # the token <0xF0>, after three special ones
    options = _options(logit_bias={half: 100.0}, stop="\ufffd", max_new_tokens=2)
    result = runtime.generate([IMAGE], PROMPT, options).result()
    assert (result.token_ids, result.text) == ((half, half), "")
    assert (result.finish_reason, result.stop_string) == ("stop", "\ufffd")


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"logprobs": 0}, {}])
def test_a_model_that_gives_nan_is_told_of(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda *arguments: logits(*arguments) * float("nan"))
    with pytest.raises(InvalidLogits, match="its weights are damaged"):
        runtime.generate([IMAGE], PROMPT, _options(**options)).result()
    assert runtime.kv_bytes_in_use == 0


def test_tokens_that_the_model_does_not_have_are_refused_before_work(directory: Path) -> None:
    runtime = Runtime.open(directory)
    size = runtime.spec.text.vocab_size
    runtime.prepare([IMAGE], PROMPT, _options(logit_bias={size - 1: 1.0}))
    beyond = _options(logit_bias={3: 1.0, size: 1.0})
    with pytest.raises(BadInput, match=f"names token {size}, but the model's ids end at {size - 1}"):
        runtime.prepare([IMAGE], PROMPT, beyond)
    with pytest.raises(BadInput, match=f"names token {size}"):
        runtime.open_images([IMAGE]).prepare(PROMPT, beyond)
