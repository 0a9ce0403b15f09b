"""The official client of OpenAI, as it is, against the service: answers, streams, usage, errors, ends.

What an answer has to say is what the runtime says in this process, and of the runtime other tests tell.
"""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from avl_edge import Message, Options
from avl_edge.server.settings import Settings
from tests.conftest import Checkpoints
from tests.equipment.served import LIMIT, Served, asking, data_url, picture, serving, wait_for
from tests.equipment.slow_backend import stopped

QUESTION = "Describe the picture in detail."
PICTURE = picture()


def _expected(served: Served, **options: Any) -> Any:
    options = {"max_new_tokens": 8, **options}
    return served.runtime.generate([PICTURE], QUESTION, Options(**options)).result()


def test_an_answer_is_the_runtime_s(served: Served) -> None:
    expected = _expected(served)
    answer = served.client().chat.completions.create(**asking(QUESTION, PICTURE))
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (expected.text, "assistant", "length")
    assert (answer.object, answer.model) == ("chat.completion", "test")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == expected.usage.prompt_tokens + 8


def test_a_stream_has_the_same_text_in_chunks(served: Served) -> None:
    expected = _expected(served)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(served.client().chat.completions.create(**asking(QUESTION, PICTURE, **options)))
    *pieces, last, usage = chunks
    assert {(each.id, each.created, each.object) for each in chunks} == {
        (chunks[0].id, chunks[0].created, "chat.completion.chunk")
    }
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in pieces) == expected.text
    assert all(each.choices[0].finish_reason is None for each in pieces)
    assert last.choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 8)  # type: ignore[union-attr]


def test_without_asking_a_stream_has_no_usage(served: Served) -> None:
    chunks = list(served.client().chat.completions.create(**asking(QUESTION, PICTURE, stream=True)))
    assert all(each.usage is None and each.choices for each in chunks)


def test_a_text_alone_is_answered(served: Served) -> None:
    expected = served.runtime.generate([], "Hello there", Options(max_new_tokens=8)).result()
    messages: Any = [{"role": "user", "content": "Hello there"}]
    answer = served.client().chat.completions.create(model="test", messages=messages, max_completion_tokens=8)
    assert answer.choices[0].message.content == expected.text


def test_several_turns_are_a_conversation(served: Served) -> None:
    said = [
        Message("user", [PICTURE, "What is it?"]),
        Message("assistant", "A field."),
        Message("user", "Of which colour?"),
    ]
    request = served.runtime.prepare_chat(said, Options(max_new_tokens=8))
    expected = served.runtime.submit(request).result()
    messages: Any = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": data_url(PICTURE), "detail": "low"}},
            ],
        },
        {"role": "assistant", "content": "A field."},
        {"role": "user", "content": "Of which colour?"},
    ]
    answer = served.client().chat.completions.create(model="test", messages=messages, max_tokens=8)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


def test_sampling_is_the_runtime_s(served: Served) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.8, "seed": 7, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    expected = _expected(served, top_k=40, min_p=0.01, logit_bias={5: -3.0}, **sampling)
    extra = {"top_k": 40, "min_p": 0.01}
    body = asking(QUESTION, PICTURE, **sampling, logit_bias={"5": -3})
    answer = served.client().chat.completions.create(**body, extra_body=extra)
    assert answer.choices[0].message.content == expected.text


def test_a_stop_string_ends_an_answer(served: Served) -> None:
    whole = _expected(served).text
    stop = whole[len(whole) // 2 :][:3]
    answer = served.client().chat.completions.create(**asking(QUESTION, PICTURE, stop=[stop]))
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_runtime_s(served: Served, stream: bool) -> None:
    expected = _expected(served, logprobs=2).logprobs
    answer = served.client().chat.completions.create(
        **asking(QUESTION, PICTURE, logprobs=True, top_logprobs=2, stream=stream)
    )
    if stream:
        of = [each.choices[0].logprobs for each in answer if each.choices[0].logprobs]
        content = [each for logprobs in of for each in logprobs.content or ()]
    else:
        content = answer.choices[0].logprobs.content
    assert [each.logprob for each in content] == pytest.approx([each.logprob for each in expected])
    assert [[top.logprob for top in each.top_logprobs] for each in content] == [
        pytest.approx([top.logprob for top in each.top]) for each in expected
    ]
    assert content[0].token == served.runtime.token_text(expected[0].token_id)


class TestErrors:
    """As the client's classes tell them apart."""

    def test_of_a_field(self, served: Served) -> None:
        with pytest.raises(openai.BadRequestError, match="temperature") as caught:
            served.client().chat.completions.create(**asking(QUESTION, temperature=3))
        assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
        assert caught.value.request_id

    def test_of_a_field_that_nobody_knows(self, served: Served) -> None:
        with pytest.raises(openai.BadRequestError, match="wish") as caught:
            served.client().chat.completions.create(**asking(QUESTION), extra_body={"wish": 1})
        assert (caught.value.param, caught.value.code) == ("wish", "unknown_field")

    def test_of_a_model(self, served: Served) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            served.client().chat.completions.create(**{**asking(QUESTION), "model": "gpt-4o"})
        assert caught.value.code == "model_not_found"

    def test_of_a_picture(self, served: Served) -> None:
        with pytest.raises(openai.UnprocessableEntityError):
            served.client().chat.completions.create(**asking(QUESTION, PICTURE[:-40]))

    def test_in_the_middle_of_a_stream(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chunk that holds an error raises in the client; the service goes on."""
        backend: Any = served.runtime.debug.backend
        decode, calls = backend.decode, iter(range(99))

        def fails(*given: Any, **named: Any) -> Any:
            if next(calls) == 3:
                raise RuntimeError("at 0x7f0011223344 something broke")
            return decode(*given, **named)

        monkeypatch.setattr(backend, "decode", fails)
        stream = served.client().chat.completions.create(**asking(QUESTION, PICTURE, stream=True))
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert "0x7f" not in str(caught.value)
        assert served.client().chat.completions.create(**asking(QUESTION, PICTURE)).choices[0].message.content
        served.wait_until_idle()

    def test_a_missed_deadline_is_not_sent_again(self, served: Served) -> None:
        came = _count(served, "request_refused_total{", 'status="504"')
        extra = {"avl_edge": {"deadline_ms": 1}}
        with pytest.raises(openai.InternalServerError) as caught:
            served.client(max_retries=2).chat.completions.create(**asking(QUESTION, PICTURE), extra_body=extra)
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        assert _count(served, "request_refused_total{", 'status="504"') == came + 1


def _count(served: Served, name: str, label: str) -> float:
    _, _, page = served.request("GET", "/metrics")
    lines = [each for each in page.splitlines() if name in each and label in each]
    return sum(float(each.rsplit(" ", 1)[1]) for each in lines)


class TestEnds:
    def test_closing_a_stream_frees_its_rows(self, served: Served) -> None:
        with stopped(served.runtime) as stop:
            stream = served.client().chat.completions.create(**asking(QUESTION, PICTURE, max_tokens=500, stream=True))
            next(iter(stream))
            assert stop.reached.wait(LIMIT)
            stream.close()
        served.wait_until_idle()

    def test_a_client_that_gives_up_ends_its_request(self, served: Served) -> None:
        """A client's own timeout must end the work: nobody computes for who is not there."""
        with stopped(served.runtime) as stop:
            with pytest.raises(openai.APITimeoutError):
                served.client(timeout=0.2).chat.completions.create(**asking(QUESTION, PICTURE, max_tokens=500))
            assert stop.reached.wait(LIMIT)
            assert wait_for(lambda: served.service.on_their_way == 0)
        served.wait_until_idle()

    def test_a_cancelled_coroutine_ends_its_request(self, served: Served) -> None:
        url = f"http://127.0.0.1:{served.port}/v1"

        async def ask() -> None:
            async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
                task = asyncio.ensure_future(
                    client.chat.completions.create(**asking(QUESTION, PICTURE, max_tokens=500))
                )
                while not served.service.on_their_way:
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        with stopped(served.runtime):
            asyncio.run(ask())
            assert wait_for(lambda: served.service.on_their_way == 0)
        served.wait_until_idle()


def test_a_full_queue_is_waited_for(checkpoint: Checkpoints) -> None:
    """The client obeys Retry-After by itself."""
    with serving(checkpoint("mistral-gqa"), Settings(names=("test",), max_queue=1)) as served:
        with stopped(served.runtime) as stop:
            stream = served.client().chat.completions.create(**asking(QUESTION, PICTURE, stream=True))
            assert stop.reached.wait(LIMIT)
            with pytest.raises(openai.RateLimitError) as caught:
                served.client().chat.completions.create(**asking(QUESTION, PICTURE))
            assert float(caught.value.response.headers["retry-after"]) >= 1
        assert list(stream)[-1].choices[0].finish_reason == "length"
        served.wait_until_idle()
        answer = served.client(max_retries=5).chat.completions.create(**asking(QUESTION, PICTURE))
        assert answer.choices[0].message.content


def test_models_are_listed(served: Served) -> None:
    assert [each.id for each in served.client().models.list()] == ["test"]
    assert served.client().models.retrieve("test").owned_by == "avl-edge"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("other")
