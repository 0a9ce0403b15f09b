"""Text, pictures and files of a tokenizer that would cost more than they are worth, and a tokenizer that panics."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.cli import run_app
from avl_edge.errors import BadModel, TooLarge
from avl_edge.files import MODEL_FILE_BYTES
from avl_edge.model.prompt import Processor
from avl_edge.model.prompt.chat import one_question
from avl_edge.model.prompt.processor import CHARACTERS_PER_TOKEN
from tests.equipment.small_processors import (
    CONTEXT,
    KINDS,
    TOKENS,
    model_directory,
    open_processor,
    pictures,
    write,
)


class Counting:
    """A tokenizer that counts how often, and how much, it is asked."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.asked.append(text)
        return self._tokenizer.encode(text, **options)


def counting(path: Path, kind: str = "llama") -> tuple[Processor, list[str]]:
    processor = open_processor(model_directory(path, kind), kind)
    tokenizer = Counting(processor.text.tokenizer)
    return replace(processor, text=replace(processor.text, tokenizer=tokenizer)), tokenizer.asked


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_tokenized_once(tmp_path: Path, kind: str) -> None:
    processor, asked = counting(tmp_path, kind)
    processor(pictures(2), "What is shown?", "Be brief.")
    assert len(asked) == 1
    assert "What is shown?" in asked[0]


def test_what_cannot_fit_is_refused_before_anything_is_tokenized(tmp_path: Path) -> None:
    processor, asked = counting(tmp_path)
    tracemalloc.start()
    start = time.process_time()
    for images, prompt, system, reason in [
        (0, "a" * 4_000_000, None, f"has 4000000 characters.*context ends at {CONTEXT}"),
        (0, "Why?", "a" * 4_000_000, "has 4000004 characters"),
        (4096, "Why?", None, f"4096 images take {4096 * TOKENS} tokens, .* context ends at {CONTEXT}: give fewer"),
        (CONTEXT // TOKENS, "Why?", None, "images take 512 tokens"),
        (CONTEXT // TOKENS - 1, "a" * (CHARACTERS_PER_TOKEN * TOKENS), None, "more than any text has"),
    ]:
        with pytest.raises(TooLarge, match=reason) as caught:
            processor.lay_out(one_question([processor.codec.fixed] * images, prompt, system))
        assert len(str(caught.value)) < 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert asked == []
    assert time.process_time() - start < 1
    assert peak < 10e6


def test_what_a_template_writes_counts_too(tmp_path: Path) -> None:
    each = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
    processor = open_processor(model_directory(tmp_path, template=each + "{{ 'a' * 40000 }}"))
    with pytest.raises(TooLarge, match=r"has 4000\d characters"):
        processor.lay_out(one_question([], "Why?"))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS)), st.text(min_size=1, max_size=300) | st.text(" -=\n", min_size=1, max_size=300))
def test_a_text_that_is_refused_unseen_would_never_fit(kind: str, text: str) -> None:
    """Of these tokenizers none makes a token of more characters than the bound assumes."""
    tokenizer = KINDS[kind][0]()
    longest = max(map(len, tokenizer.get_vocab()))
    assert longest <= CHARACTERS_PER_TOKEN
    ids = tokenizer.encode(text.strip() or "a", add_special_tokens=False).ids
    assert len(text.strip()) <= CHARACTERS_PER_TOKEN * len(ids)


def test_special_tokens_of_the_template_do_not_excuse_those_of_the_prompt(tmp_path: Path) -> None:
    """The unigram tokenizer normalizes fullwidth brackets, and the picture's own placeholder is in the same text."""
    processor = open_processor(model_directory(tmp_path, "unigram"), "unigram")
    plain = processor.lay_out(one_question([processor.codec.fixed], "What is it?")).token_ids
    for spelling in ("\uff1cimage\uff1e", "\uff1cs\uff1e"):
        asked = processor.lay_out(one_question([processor.codec.fixed], f"What is {spelling}?")).token_ids
        for token in processor.text.special:
            if token != processor.text.tokenizer.token_to_id("<unk>"):
                assert asked.count(token) == plain.count(token)


# --- tokenizers that fail ---


def broken(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    directory = model_directory(path)
    content = json.loads((directory / "tokenizer.json").read_text())
    change(content)
    write(directory / "tokenizer.json", content)
    return directory


NORMALIZERS = {
    "no charsmap": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "no base64": {"type": "Precompiled", "precompiled_charsmap": "!!"},
    "no expression": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
    "no such kind": {"type": "Other"},
}


@pytest.mark.parametrize("case", NORMALIZERS)
def test_a_normalizer_that_does_not_parse_is_a_bad_model(tmp_path: Path, case: str) -> None:
    """The first two panic in Rust, which no ``except Exception`` catches."""
    directory = broken(tmp_path, lambda content: content.update(normalizer=NORMALIZERS[case]))
    with pytest.raises(BadModel, match=r"tokenizer\.json is broken \(.*\): download it again") as caught:
        open_processor(directory)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_panic_is_one_line_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from avl_edge.model.demo import DEMO

    for file in DEMO.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    write(tmp_path / "tokenizer.json", content | {"normalizer": NORMALIZERS["no charsmap"]})
    assert run_app(["run", "--model", str(tmp_path), "--prompt", "Why?"]) == BadModel.exit_code == 2
    said = capsys.readouterr().err
    assert said.startswith("avl-edge: ")
    assert said.count("\n") == 1


class PanicException(BaseException):
    """As PyO3 raises a Rust panic."""


class Panicking(Counting):
    """A tokenizer that panics when it is used."""

    def encode(self, text: str, **_: Any) -> Any:
        raise PanicException(f"no entry found for key\n{text}")

    def decode(self, *_: Any, **__: Any) -> Any:
        raise PanicException("index out of bounds")


def test_a_tokenizer_that_panics_in_use_is_a_bad_model(tmp_path: Path) -> None:
    processor = open_processor(model_directory(tmp_path))
    failing = replace(processor, text=replace(processor.text, tokenizer=Panicking(processor.text.tokenizer)))
    with pytest.raises(BadModel, match="the model's tokenizer failed: no entry found for key USER: Why"):
        failing.lay_out(one_question([], "Why?"))
    with pytest.raises(BadModel, match="the model's tokenizer failed: index out of bounds"):
        failing.detokenizer().push(300)


# --- files ---


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 200_000, "is not valid JSON"),
        ('{"a": ' * 200_000, "is not valid JSON"),
        ('{"a": ' + "1" * 100_000 + "}", "is not valid JSON"),
        ('{"a": "' + "x" * MODEL_FILE_BYTES + '"}', "has more than 8.4 MB: no such file of a model is so large"),
    ],
    ids=["lists", "objects", "digits", "large"],
)
def test_files_of_a_model_are_bounded(tmp_path: Path, name: str, content: str, reason: str) -> None:
    directory = model_directory(tmp_path)
    write(directory / name, content)
    with pytest.raises(BadModel, match=reason) as caught:
        open_processor(directory)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_template_with_line_ends_of_windows_is_read_as_any_other(tmp_path: Path) -> None:
    directory = model_directory(tmp_path)
    processor = open_processor(directory)
    unix = processor.lay_out(one_question([processor.codec.fixed], "Why?"))
    source = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_bytes(source.replace("\n", "\r\n").encode())
    assert open_processor(directory).lay_out(one_question([processor.codec.fixed], "Why?")) == unix
