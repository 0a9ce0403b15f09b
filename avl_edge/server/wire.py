"""What clients send: the fields of a chat completion, those without effect among them, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from .refusals import Refusal

Text: TypeAlias = Annotated[str, Field(max_length=2**24)]
Name: TypeAlias = Annotated[str, Field(max_length=256)]
Schema: TypeAlias = dict[str, Any]


class Part(BaseModel):
    """Base of everything on the wire: a field that nobody knows is refused by its name."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(Part):
    type: Literal["text", "input_text"]
    text: Text


class ImageUrl(Part):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Part):
    """A picture as a data URL. With ``uuid`` it may be referred to later, by a part with ``image_url`` null."""

    type: Literal["image_url"]
    image_url: ImageUrl | str | None
    uuid: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class CameraPart(Part):
    """The latest frame of a ``camera``, at most so old."""

    type: Literal["input_image"]
    camera: Name
    max_age_ms: Annotated[float, Field(gt=0)] | None = None


class RefusalPart(Part):
    type: Literal["refusal"]
    refusal: Text


Content: TypeAlias = Annotated[TextPart | ImagePart | CameraPart, Field(discriminator="type")]


class FunctionCall(Part):
    name: Name
    arguments: Text


class ToolCall(Part):
    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class SystemMessage(Part):
    role: Literal["system", "developer"]
    content: Text | list[TextPart]
    name: Name | None = None


class UserMessage(Part):
    role: Literal["user"]
    content: Text | list[Content]
    name: Name | None = None


class AssistantMessage(Part):
    """An earlier answer, as clients send it back: what the service does not give is null there."""

    role: Literal["assistant"]
    content: Text | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = None
    name: Name | None = None
    refusal: Text | None = None
    tool_calls: list[ToolCall] | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None


class ToolMessage(Part):
    role: Literal["tool"]
    content: Text | list[TextPart]
    tool_call_id: Name


Message: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class StreamOptions(Part):
    include_usage: bool = False
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool = False


class JsonSchema(Part):
    name: Name
    description: Text | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Part):
    name: Name
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    name: Name


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class Own(Part):
    """The fields that are this service's own.

    ``method`` with its ``parameters``, ``formats``, ``kv_budget`` and ``preset`` are those of :class:`Options`.
    ``priority``: lower is sooner. ``deadline_ms``: from when the request has come. ``late`` says what becomes of an
    answer that is not complete then: ``refuse`` refuses it, also beforehand where it cannot be met; ``cut`` ends it
    there; ``drop`` begins it in any case, and refuses it when it is late.
    ``camera`` shows its latest frame, at most ``max_age_ms`` old, with the last message. ``explain`` adds to the answer
    how it was computed.
    """

    method: Name | None = None
    parameters: Annotated[dict[str, float], Field(max_length=32)] = {}
    formats: Name | None = None
    kv_budget: int | Name | None = None
    preset: Name | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    deadline_ms: Annotated[float, Field(gt=0, le=86_400_000)] | None = None
    late: Literal["refuse", "cut", "drop"] = "refuse"
    camera: Name | None = None
    max_age_ms: Annotated[float, Field(gt=0)] | None = None
    explain: bool = False


class ChatRequest(Part):
    """The body of ``POST /v1/chat/completions``. The fields below the line are known and without effect."""

    model: Name
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    stop: Annotated[str, Field(max_length=256)] | Annotated[list[Name], Field(max_length=16)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    avl_edge: Own | None = None
    # ---- without effect
    user: Text | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Name | None = None
    prediction: dict[str, Any] | None = None
    verbosity: Name | None = None
    reasoning_effort: Name | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def own(self) -> Own:
        """``avl_edge``, or its defaults."""
        return self.avl_edge or Own()


def parse(body: bytes) -> ChatRequest:
    """The request in ``body``; :class:`Refusal` naming the first field that is not as it has to be."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error, body) from None
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is no JSON that can be read: send a JSON object", code="invalid_json") from None


def _refused(error: ValidationError, body: bytes) -> Refusal:
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    # Where a value may be of several kinds there is an error for each: what is meant is the one that it comes closest
    # to.
    field = errors[0]["loc"][:1]
    meant = max((each for each in errors if each["loc"][:1] == field), key=lambda each: len(each["loc"]))
    if meant["type"] == "json_invalid" or not field:
        return Refusal(400, f"the body cannot be read: {meant['msg'][:200]}", code="invalid_json")
    path = ".".join(_path(meant["loc"], from_json(body)))[:200]
    if meant["type"] == "extra_forbidden":
        said = f"{path} is a field that this service does not know: leave it out"
        return Refusal(400, said, param=path, code="unknown_field")
    return Refusal(400, f"{path}: {meant['msg'][:200]}", param=path, code="invalid_value")


def _path(places: Sequence[int | str], content: Any) -> Iterator[str]:
    """``places`` without the names of kinds, which are no fields of ``content``."""
    for number, place in enumerate(places):
        number_in_list = isinstance(content, list) and isinstance(place, int) and place < len(content)
        if number_in_list or (isinstance(content, dict) and place in content):
            content = content[place]
        elif number < len(places) - 1 or not isinstance(content, dict) or place in _KINDS:
            continue
        yield str(place)


_KINDS = {"system", "developer", "user", "assistant", "tool", "text", "input_text", "image_url", "input_image"}
