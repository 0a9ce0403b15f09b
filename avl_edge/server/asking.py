"""From a request on the wire to options of the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ..config import Options, require
from ..errors import BadInput
from ..kv.methods.notation import format_names
from .refusals import Refusal
from .wire import ChatRequest


@dataclass(frozen=True)
class Urgency:
    """When an answer is wanted: ``priority`` as the engine takes it, higher is sooner; ``deadline``, seconds from when
    the request came, and what becomes of it when it is ``late``."""

    priority: int = 0
    deadline: float | None = None
    late: str = "refuse"


def check_model(asked: ChatRequest, names: tuple[str, ...]) -> None:
    """:class:`Refusal` for a model that is not served here."""
    if asked.model not in names:
        known = ", ".join(names)
        said = f"there is no model {asked.model[:100]!r} here: ask for {known}"
        raise Refusal(404, said, param="model", code="model_not_found")


def options_of(asked: ChatRequest, max_tokens: int) -> Options:
    """The options of a request whose answer has ``max_tokens`` where it does not say; :class:`Refusal` by field."""
    own = asked.own
    values = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": None if asked.top_k is None else max(asked.top_k, 0),
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "presence_penalty": asked.presence_penalty,
        "seed": asked.seed,
        "stop": asked.stop,
        "method": own.method,
        "preset": own.preset,
        "kv_budget": own.kv_budget,
    }
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return Options(
            **given,  # type: ignore[arg-type]
            parameters=own.parameters,
            formats=format_names(None, None, None, own.formats),
            logit_bias=_biases(asked),
            logprobs=_logprobs(asked),
            json_schema=_schema(asked),
            max_new_tokens=asked.max_completion_tokens or asked.max_tokens or max_tokens,
        )
    except BadInput as error:
        raise Refusal(400, str(error), param=_blamed(str(error), given), code="invalid_value") from None


def urgency_of(asked: ChatRequest, headers: dict[str, str]) -> Urgency:
    """What the fields say, and where they do not the headers ``x-priority`` and ``x-deadline-ms``."""
    own = asked.own
    priority = own.priority if own.priority is not None else asked.priority
    if priority is None:
        priority = int(_number(headers, "x-priority", -1000, 1000) or 0)
    deadline = own.deadline_ms if own.deadline_ms is not None else _number(headers, "x-deadline-ms", 1, 86_400_000)
    return Urgency(-priority, None if deadline is None else deadline / 1000, own.late)


def _number(headers: dict[str, str], name: str, least: float, most: float) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        number = float(text)
        require(least <= number <= most, "")
    except (ValueError, BadInput):
        said = f"the header {name} must be a number from {least:g} to {most:g}"
        raise Refusal(400, said, param=name, code="invalid_value") from None
    return number


def _biases(asked: ChatRequest) -> dict[int, float]:
    given = asked.logit_bias or {}
    if not all(token.isascii() and token.isdigit() and len(token) < 12 for token in given):
        raise Refusal(400, "logit_bias maps token ids, written as whole numbers, to biases", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _schema(asked: ChatRequest) -> str | None:
    form = asked.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return '{"type": "object"}'
    if form.json_schema is None or form.json_schema.schema_ is None:
        said = "response_format of the type json_schema needs a json_schema with a schema"
        raise Refusal(400, said, param="response_format.json_schema", code="invalid_value")
    return json.dumps(form.json_schema.schema_)


def check_tools(asked: ChatRequest) -> None:
    """:class:`Refusal` for tools that the model would have to be told of: no family's template has them."""
    if asked.tools and asked.tool_choice != "none":
        said = "tools are not served: no template of this model's family has them; leave them out"
        raise Refusal(400, said, param="tools", code="unsupported_value")


def _logprobs(asked: ChatRequest) -> int | None:
    if asked.top_logprobs and not asked.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: set it to true", param="top_logprobs", code="invalid_value")
    return (asked.top_logprobs or 0) if asked.logprobs else None


def _blamed(message: str, given: Mapping[str, object]) -> str | None:
    """The field that an error of the options speaks of first."""
    own = ("method", "preset", "kv_budget", "parameters", "formats")
    places = {name: message.find(name.split("_")[0]) for name in (*given, "logit_bias", "parameters")}
    found = min((place, name) for name, place in {**places, "": len(message)}.items() if place >= 0)[1]
    return f"avl_edge.{found}" if found in own else found or None
