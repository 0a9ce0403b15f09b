"""From a conversation to the text that the tokenizer gets, by the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

from jinja2 import TemplateError

from ...config import Picture
from ...errors import BadInput, BadModel, reason, refusing
from ...files import read_json, read_text
from .chat import ASSISTANT, USER, Turn, one_question
from .sandbox import BUDGET, Sandbox

Message = dict[str, Any]
_PROBE = "probe text"
_PROBED = one_question([Picture(1, 1, 1)], _PROBE)
_MOST_BETWEEN, _MOST_FORMAT = 16, 256
_STEPS_PER_CHARACTER, _STEPS_PER_PART = 8, 1000  # a template looks at each several times


class ChatTemplate(Protocol):
    """Writes a conversation, one placeholder per picture, and the opening of the answer."""

    def render(self, turns: Sequence[Turn]) -> str:
        """The text to tokenize. Raises BadModel if the template fails, and BadInput if it refuses the turns."""


class LlavaConvention:
    """How LLaVA 1.5 was trained; for models that come without a template. ``end`` closes an answer."""

    def __init__(self, placeholder: str, end: str = "") -> None:
        self._placeholder = placeholder
        self._end = end

    def render(self, turns: Sequence[Turn]) -> str:
        """``[system ]USER: [<image>\\n ...]prompt ASSISTANT:``, answers of earlier turns in between."""
        return "".join(map(self._render, turns)) + "ASSISTANT:"

    def _render(self, turn: Turn) -> str:
        if turn.role == ASSISTANT:
            return f"ASSISTANT: {_joined(turn, self._placeholder)}{self._end}"
        return "USER: " * (turn.role == USER) + f"{_joined(turn, self._placeholder)} "


def _content(part: str | Picture) -> list[Message]:
    """As templates take it. A video is one part, in the place of its first moment."""
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    if part.moment is None:
        return [{"type": "image"}]
    return [{"type": "video"}] if part.moment == 0 else []


def _joined(turn: Turn, placeholder: str) -> str:
    return "".join(part if isinstance(part, str) else f"{placeholder}\n" for part in turn.parts)


class JinjaTemplate:
    """A chat template in the dialect of transformers, in a sandbox.

    Templates of vision models take a message's content as a list of parts; those of language models take it as a
    string, in which the placeholders are then written as in `LlavaConvention`. Rendering a probe tells which.
    """

    def __init__(self, source: str, variables: Mapping[str, str], placeholder: str, where: str) -> None:
        self._variables = dict(variables)
        self._placeholder = placeholder
        self._where = where
        self._sandbox = Sandbox(
            {"tojson": _tojson}, {"raise_exception": _raise_exception, "strftime_now": strftime_now}
        )
        with self._refusing():
            self._template = self._sandbox.compiled(source)
        self._content_is_list = self._choose_content()

    def render(self, turns: Sequence[Turn]) -> str:
        """The rendered text. Raises BadInput with the template's own words if it refuses the turns, BadModel if it
        fails."""
        with self._refusing():
            try:
                return self._render(turns, self._content_is_list)
            except _Refused as error:
                words = reason(error)
                raise BadInput(f"the model's chat template does not take such a conversation: {words}") from None

    def _render(self, turns: Sequence[Turn], as_list: bool) -> str:
        messages = [self._message(each, as_list) for each in turns]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        parts = sum(len(each.parts) for each in turns)
        characters = sum(len(text) for each in turns for text in each.texts)
        budget = BUDGET + _STEPS_PER_PART * (len(turns) + parts) + _STEPS_PER_CHARACTER * characters
        return self._sandbox.render(self._template, given | self._variables, budget)

    def _message(self, turn: Turn, as_list: bool) -> Message:
        if not as_list:
            return {"role": turn.role, "content": _joined(turn, self._placeholder)}
        return {"role": turn.role, "content": [each for part in turn.parts for each in _content(part)]}

    def _choose_content(self) -> bool:
        failure: BadModel | None = None
        for as_list in (True, False):
            try:
                with self._refusing():
                    text = self._render(_PROBED, as_list)
            except BadModel as error:
                failure = failure or error
                continue
            # A template for strings prints the list of parts itself, "type" and all.
            if text.count(self._placeholder) == 1 and _PROBE in text and "'type':" not in text:
                return as_list
        raise failure or BadModel(
            f"the chat template in {self._where} does not write {self._placeholder} once and the prompt for one image"
        )

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """A template is foreign code, which fails as it likes."""
        line = None

        def failed(why: str) -> BadModel:
            place = f", line {line}" if line else ""
            return BadModel(f"the chat template in {self._where}{place} failed: {why}")

        with refusing(failed):
            try:
                yield
            except Exception as error:
                line = getattr(error, "lineno", None)
                raise


def open_template(
    directory: Path, variables: Mapping[str, str], placeholder: str, usual: str | None = None
) -> ChatTemplate:
    """The model's template. ``variables`` are its special tokens by name, such as bos_token.

    Looked for in processor_config.json, chat_template.json, chat_template.jinja and tokenizer_config.json, the order
    of transformers; without any, ``usual``, or `LlavaConvention`. Raises BadModel for a template that is broken.
    """
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        path = directory / name
        content = read_text(path) if path.suffix == ".jinja" else (read_json(path) or {}).get("chat_template")
        if content is not None:
            return JinjaTemplate(_default_source(content, path), variables, placeholder, str(path))
    if usual:
        return JinjaTemplate(usual, variables, placeholder, "avl-edge")
    return LlavaConvention(placeholder, variables.get("eos_token", ""))


def _default_source(content: Any, path: Path) -> str:
    """The template's source, of several named ones that called "default"."""
    if isinstance(content, list):
        content = {entry.get("name"): entry.get("template") for entry in content if isinstance(entry, dict)}
    if isinstance(content, dict):
        if "default" not in content:
            names = ", ".join(map(str, content)) or "none"
            raise BadModel(f'{path} has no chat template named "default", only: {names}')
        content = content["default"]
    if not isinstance(content, str):
        raise BadModel(f"the chat template in {path} must be a string, not {type(content).__name__}")
    return content


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja's own filter escapes for HTML. What stands between any two values has to be short."""
    between = [*(separators or ()), indent if isinstance(indent, str) else " " * min(indent or 0, _MOST_BETWEEN + 1)]
    if any(len(each) > _MOST_BETWEEN for each in between):
        raise TemplateError(f"tojson puts at most {_MOST_BETWEEN} characters between two values")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Refused(TemplateError):
    """A template's own words about messages that it does not take."""


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def strftime_now(form: str) -> str:
    """The date and time of now, as templates ask for it. A long format may ask for any number of characters."""
    if len(form) > _MOST_FORMAT:
        raise TemplateError(f"a date's format has at most {_MOST_FORMAT} characters")
    return datetime.now().strftime(form)
