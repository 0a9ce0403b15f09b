"""The processor: token ids, spans and pixels equal to those of transformers' LlavaProcessor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avl_edge.model.images.preprocess import digest
from tests.equipment.pixels import stacked
from tests.equipment.small_processors import (
    BOS_TEMPLATE,
    KINDS,
    PROMPTS,
    TEMPLATES,
    TOKENS,
    image_id,
    model_directory,
    open_processor,
    pictures,
    reference,
    write,
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_and_pixels_equal_transformers(tmp_path: Path, kind: str, template: str) -> None:
    source = TEMPLATES[template]
    if kind == "byte-level" and source == BOS_TEMPLATE:
        source = BOS_TEMPLATE.replace("{{ bos_token }}", "")
    path = model_directory(tmp_path, kind, source)
    processor = open_processor(path, kind)
    cases = [(n, p, s) for n, s in ((1, None), (2, "Be brief."), (0, None)) for p in PROMPTS]
    for number, prompt, system in cases:
        images = pictures(number)
        got = processor(images, prompt, system)
        expected = reference(path, images, prompt, system, source is not None)
        assert list(got.token_ids) == list(expected["input_ids"][0])
        if number:
            assert np.array_equal(stacked(got), np.stack(expected["pixel_values"]))
        else:
            assert got.pixel_values is None


@pytest.mark.parametrize("kind", KINDS)
def test_files_as_transformers_saves_them(tmp_path: Path, kind: str) -> None:
    from transformers import LlavaProcessor

    path, saved = model_directory(tmp_path / "old", kind), tmp_path / "new"
    LlavaProcessor.from_pretrained(path).save_pretrained(saved)
    assert not (saved / "preprocessor_config.json").exists()
    one, two = (open_processor(p, kind)(pictures(2), PROMPTS[1], "Be brief.") for p in (path, saved))
    assert one.token_ids == two.token_ids
    assert one.spans == two.spans


@pytest.mark.parametrize("kind", ["llama", "llama, legacy", "unigram"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_bos_stands_exactly_once(tmp_path: Path, kind: str, template: str) -> None:
    processor = open_processor(model_directory(tmp_path, kind, TEMPLATES[template]), kind)
    token_ids = processor(pictures(1), "What is this?").token_ids
    assert token_ids[0] == 1
    assert token_ids.count(1) == 1


def test_spans_point_at_the_placeholders_of_each_picture(tmp_path: Path) -> None:
    touching = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
    processor = open_processor(model_directory(tmp_path, template=touching))
    images = pictures(3)
    prompt = processor([images[0], images[1], images[0]], "What changed?")
    assert len(prompt.spans) == len(prompt.pixel_values.pictures) == 3
    for span, pixels in zip(prompt.spans, prompt.pixel_values.pictures, strict=True):
        assert span.length == TOKENS
        assert set(prompt.token_ids[span.start : span.start + TOKENS]) == {image_id()}
        assert span.digest == digest(pixels)
    assert [b.start - a.start for a, b in zip(prompt.spans, prompt.spans[1:], strict=False)] == [TOKENS, TOKENS]
    assert prompt.spans[0].digest == prompt.spans[2].digest != prompt.spans[1].digest
    assert stacked(prompt).dtype == np.float32


def test_detokenizer_skips_special_tokens(tmp_path: Path) -> None:
    processor = open_processor(model_directory(tmp_path))
    detokenizer = processor.detokenizer()
    ids = processor([], "two dogs").token_ids
    text = "".join(map(detokenizer.push, [*ids, image_id(), 2])) + detokenizer.finish()
    assert text == "USER: two dogs ASSISTANT:"
    assert processor.detokenizer() is not detokenizer


def test_tokens_described_only_in_the_tokenizers_settings_are_added_as_transformers_adds_them(tmp_path: Path) -> None:
    from transformers import LlavaProcessor

    path = model_directory(tmp_path)
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in ("<image>", "<pad>")]
    write(path / "tokenizer.json", content)
    token = {"content": "<image>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    settings_ = json.loads((path / "tokenizer_config.json").read_text())
    settings_["added_tokens_decoder"] = {str(image_id()): token | {"special": True}}
    write(path / "tokenizer_config.json", settings_)
    assert LlavaProcessor.from_pretrained(path).image_token_id == image_id()
    got = open_processor(path)(pictures(1), PROMPTS[0])
    assert list(got.token_ids) == list(reference(path, pictures(1), PROMPTS[0], None, True)["input_ids"][0])


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 5]}, {"eos_token_id": 7}, {2, 5}),
        ({"eos_token_id": 9}, {}, {9, 2}),
        ({"eos_token_id": []}, {"eos_token_id": 7}, set()),
        ({}, {"eos_token_id": 7, "text_config": {"eos_token_id": 8}}, {7, 2}),
        (None, {"text_config": {"eos_token_id": 8}}, {8, 2}),
        (None, {"text_config": {"eos_token_id": None}}, {2}),
    ],
)
def test_eos_token_ids(tmp_path: Path, generation: Any, config: Any, expected: set[int]) -> None:
    path = model_directory(tmp_path)
    write(path / "config.json", config)
    if generation is not None:
        write(path / "generation_config.json", generation)
    assert open_processor(path).eos_token_ids == frozenset(expected)
