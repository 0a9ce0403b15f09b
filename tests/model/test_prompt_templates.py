"""Chat templates: those that are found and rendered as transformers does, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avl_edge.config import Picture
from avl_edge.errors import BadInput, BadModel
from avl_edge.model.prompt.chat import one_question
from tests.equipment.small_processors import (
    LLAVA_TEMPLATE,
    STRING_TEMPLATE,
    model_directory,
    open_processor,
    pictures,
    write,
)


def test_a_template_for_strings_gets_strings(tmp_path: Path) -> None:
    from transformers import LlavaProcessor

    path = model_directory(tmp_path, template=STRING_TEMPLATE)
    messages = [{"role": "user", "content": "<image>\nWhat is this?"}]
    text = LlavaProcessor.from_pretrained(path).apply_chat_template(messages)
    expected = LlavaProcessor.from_pretrained(path)(images=pictures(1), text=text)
    got = open_processor(path)(pictures(1), "What is this?")
    assert list(got.token_ids) == list(expected["input_ids"][0])


def test_the_template_is_found_where_transformers_finds_it(tmp_path: Path) -> None:
    from transformers import LlavaProcessor

    path = model_directory(tmp_path, template=None)
    settings_ = json.loads((path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAVA_TEMPLATE}]
    for content in (LLAVA_TEMPLATE, named):
        write(path / "tokenizer_config.json", settings_ | {"chat_template": content})
        assert (
            open_processor(path).template.render(one_question([Picture(1, 1, 1)], "Hi"))
            == "USER: <image>\nHi ASSISTANT:"
        )
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json"):
        source = f"{name}: " + LLAVA_TEMPLATE
        if name.endswith("json"):
            old = json.loads((path / name).read_text()) if (path / name).exists() else {}
            write(path / name, old | {"chat_template": source})
        else:
            write(path / name, source)
        processor = LlavaProcessor.from_pretrained(path)
        expected = processor.apply_chat_template([{"role": "user", "content": []}])
        assert expected.startswith(f"{name}: ")
        assert open_processor(path).template.render(one_question([], "Hi")).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "line 1 failed: Expected an expression"),
        ("{{ raise_exception('no pictures here') }}", "failed: no pictures here"),
        ("{{ messages[0].content.__class__.__mro__ }}", "failed: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "failed: access to attribute 'append'"),
        ("{{ 1 // 0 }}", "failed: "),
        ("hello", "does not write <image> once"),
        ("<image><image>{{ messages[0].content[-1].text }}", "does not write <image> once"),
    ],
)
def test_a_broken_template_is_a_bad_model(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(BadModel, match=reason) as caught:
        open_processor(model_directory(tmp_path, template=template))
    assert "chat_template.jinja" in str(caught.value)


def test_a_template_that_refuses_a_system_text_says_so(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('system role not supported') }}{% endif %}"
    processor = open_processor(model_directory(tmp_path, template=strict + LLAVA_TEMPLATE))
    assert processor(pictures(1), "Hi").spans
    with pytest.raises(BadInput, match="chat template does not take such a conversation: system role not supported"):
        processor(pictures(1), "Hi", "Be brief.")


def test_named_templates_without_default_are_refused(tmp_path: Path) -> None:
    path = model_directory(tmp_path, template=None)
    write(path / "chat_template.json", {"chat_template": [{"name": "rag", "template": "x"}]})
    with pytest.raises(BadModel, match='no chat template named "default", only: rag'):
        open_processor(path)
