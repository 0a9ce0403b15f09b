"""From images, a prompt and a system text to the text that the tokenizer gets, by the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...config import read_json, read_text
from ...errors import BadModel

Message = dict[str, Any]
_PROBE = "probe text"


class ChatTemplate(Protocol):
    """Writes one placeholder per image, the prompt and the opening of the answer."""

    def render(self, images: int, prompt: str, system: str | None) -> str:
        """The text to tokenize. Raises BadModel if the template fails."""


class LlavaConvention:
    """How LLaVA 1.5 was trained; for models that come without a template."""

    def __init__(self, placeholder: str) -> None:
        self._placeholder = placeholder

    def render(self, images: int, prompt: str, system: str | None) -> str:
        """``[system ]USER: [<image>\\n ...]prompt ASSISTANT:``."""
        opening = f"{system} " if system else ""
        return opening + "USER: " + f"{self._placeholder}\n" * images + prompt + " ASSISTANT:"


class JinjaTemplate:
    """A chat template in the dialect of transformers, in a sandbox.

    Templates of vision models take a message's content as a list of parts; those of language models take it as a
    string, in which the placeholders are then written as in `LlavaConvention`. Rendering a probe tells which.
    """

    def __init__(self, source: str, variables: Mapping[str, str], placeholder: str, where: str) -> None:
        self._variables = dict(variables)
        self._placeholder = placeholder
        self._where = where
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # a template is foreign code
            raise self._failed(error) from None
        self._content_is_list = self._choose_content()

    def render(self, images: int, prompt: str, system: str | None) -> str:
        """The rendered text. Raises BadModel with the template's own words if it fails."""
        return self._render(images, prompt, system, self._content_is_list)

    def _render(self, images: int, prompt: str, system: str | None, as_list: bool) -> str:
        messages = [self._message("system", 0, system, as_list)] if system else []
        messages.append(self._message("user", images, prompt, as_list))
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._variables
            )
        except Exception as error:  # a template is foreign code
            raise self._failed(error) from None

    def _message(self, role: str, images: int, text: str, as_list: bool) -> Message:
        if not as_list:
            return {"role": role, "content": f"{self._placeholder}\n" * images + text}
        parts: list[Message] = [{"type": "image"} for _ in range(images)]
        return {"role": role, "content": [*parts, {"type": "text", "text": text}]}

    def _choose_content(self) -> bool:
        failure: BadModel | None = None
        for as_list in (True, False):
            try:
                text = self._render(1, _PROBE, None, as_list)
            except BadModel as error:
                failure = failure or error
                continue
            # A template for strings prints the list of parts itself, "type" and all.
            if text.count(self._placeholder) == 1 and _PROBE in text and "'type':" not in text:
                return as_list
        raise failure or BadModel(
            f"the chat template in {self._where} does not write {self._placeholder} once and the prompt for one image"
        )

    def _failed(self, error: Exception) -> BadModel:
        line = getattr(error, "lineno", None)
        place = f", line {line}" if line else ""
        return BadModel(f"the chat template in {self._where}{place} failed: {str(error) or type(error).__name__}")


def open_template(directory: Path, variables: Mapping[str, str], placeholder: str) -> ChatTemplate:
    """The model's template. ``variables`` are its special tokens by name, such as bos_token.

    Looked for in processor_config.json, chat_template.json, chat_template.jinja and tokenizer_config.json, the order
    of transformers; without any, `LlavaConvention`. Raises BadModel for a template that is broken.
    """
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        path = directory / name
        content = read_text(path) if path.suffix == ".jinja" else (read_json(path) or {}).get("chat_template")
        if content is not None:
            return JinjaTemplate(_default_source(content, path), variables, placeholder, str(path))
    return LlavaConvention(placeholder)


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


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's text for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """The date and time of now, as templates ask for it."""
    return datetime.now().strftime(form)
