"""Answers by a JSON schema, as OpenAI's client and pydantic read them: a random model would say no such thing."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

from avl_edge import BadInput, Options
from tests.equipment.served import Served, asking, picture

QUESTION, PICTURE = "What is it?", picture()


class Lamp(BaseModel):
    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "green", "blue"]
    is_lit: bool


class Dashboard(BaseModel):
    speed: Literal[10, 20, 130]
    unit: Literal["km/h", "mph"]
    lamps: tuple[Lamp, Lamp]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}])
def test_an_answer_is_parsed_by_the_client(served: Served, sampling: dict[str, Any]) -> None:
    body = {**asking(QUESTION, PICTURE), **sampling, "max_tokens": 200}
    answer = served.client().chat.completions.parse(**body, response_format=Dashboard)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Dashboard)


def test_a_stream_has_the_same_answer(served: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": Lamp.model_json_schema(), "strict": True}}
    body = {**asking(QUESTION, PICTURE), "max_tokens": 200, "response_format": form}
    whole = served.client().chat.completions.create(**body).choices[0].message.content
    chunks = served.client().chat.completions.create(**body, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == whole
    Lamp.model_validate_json(whole)


def test_a_schema_and_a_neighbour_without_one(served: Served) -> None:
    expected = served.runtime.generate([PICTURE], QUESTION, Options(max_new_tokens=40)).result().text
    lamp = json.dumps(Lamp.model_json_schema())
    both = [
        served.runtime.generate([PICTURE], QUESTION, Options(max_new_tokens=40, json_schema=each))
        for each in (None, lamp, None)
    ]
    texts = [each.result().text for each in both]
    assert [texts[0], texts[2]] == [expected, expected]
    Lamp.model_validate_json(texts[1])


def test_an_object_of_any_kind(served: Served) -> None:
    form = {"type": "json_object"}
    body = {**asking(QUESTION, PICTURE), "max_tokens": 30, "response_format": form, "logit_bias": {}}
    assert served.client().chat.completions.create(**body).choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    "schema", [{"type": "wizard"}, {"$ref": "https://example.com/a.json"}, {"pattern": "(", "type": "string"}, False, 1]
)
def test_what_cannot_be_obeyed_is_refused(served: Served, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError):
        served.client().chat.completions.create(**asking(QUESTION), response_format=form)


def test_a_schema_is_bounded() -> None:
    with pytest.raises(BadInput, match="at most 65536 characters"):
        Options(json_schema=json.dumps({"enum": ["a" * 70_000]}))


def test_tools_are_refused_by_name(served: Served) -> None:
    tools: Any = [{"type": "function", "function": {"name": "brake", "parameters": {"type": "object"}}}]
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().chat.completions.create(**asking(QUESTION), tools=tools)
    assert caught.value.param == "tools"
    assert served.client().chat.completions.create(**asking(QUESTION), tools=tools, tool_choice="none").choices
