"""From images, a prompt and a system text to the text that the tokenizer gets, by the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

from jinja2 import TemplateError

from ...errors import BadModel, refusing
from ...files import read_json, read_text
from .sandbox import BUDGET, Sandbox

Message = dict[str, Any]
_PROBE = "probe text"
_MOST_BETWEEN, _MOST_FORMAT = 16, 256
_STEPS_PER_CHARACTER, _STEPS_PER_IMAGE = 8, 1000  # a template looks at each several times


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
        self._sandbox = Sandbox(
            {"tojson": _tojson}, {"raise_exception": _raise_exception, "strftime_now": strftime_now}
        )
        with self._refusing():
            self._template = self._sandbox.compiled(source)
        self._content_is_list = self._choose_content()

    def render(self, images: int, prompt: str, system: str | None) -> str:
        """The rendered text. Raises BadModel with the template's own words if it fails."""
        return self._render(images, prompt, system, self._content_is_list)

    def _render(self, images: int, prompt: str, system: str | None, as_list: bool) -> str:
        messages = [self._message("system", 0, system, as_list)] if system else []
        messages.append(self._message("user", images, prompt, as_list))
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        budget = BUDGET + _STEPS_PER_IMAGE * images + _STEPS_PER_CHARACTER * (len(prompt) + len(system or ""))
        with self._refusing():
            return self._sandbox.render(self._template, given | self._variables, budget)

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

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """A template is foreign code, which fails as it likes."""
        line = None

        def failed(reason: str) -> BadModel:
            place = f", line {line}" if line else ""
            return BadModel(f"the chat template in {self._where}{place} failed: {reason}")

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
    return JinjaTemplate(usual, variables, placeholder, "avl-edge") if usual else LlavaConvention(placeholder)


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


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """The date and time of now, as templates ask for it. A long format may ask for any number of characters."""
    if len(form) > _MOST_FORMAT:
        raise TemplateError(f"a date's format has at most {_MOST_FORMAT} characters")
    return datetime.now().strftime(form)
