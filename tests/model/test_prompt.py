"""The processor: token ids equal to transformers' LlavaProcessor, and what is refused, with its message."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from avl_edge.errors import BadImage, BadInput, BadModel
from avl_edge.model.prompt import Processor
from avl_edge.model.prompt.preprocess import digest
from tests.equipment.small_tokenizers import byte_level, llama, llama_legacy, unigram

VOCAB_SIZE = 420
PATCH, EDGE = 14, 56
TOKENS = (EDGE // PATCH) ** 2
IMAGE_SETTINGS = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": EDGE},
    "crop_size": {"height": EDGE, "width": EDGE},
}
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}\n"
)
BOS_TEMPLATE = (
    "{{ bos_token }}\n{% for message in messages %}\n    {% for part in message.content %}\n"
    "    {% if part.type == 'image' %}<image>{% else %}{{ part.text | trim }}{{ {'n': [1, '<é>']} | tojson }}\n"
    "    {% endif %}\n"
    "    {% if loop.last %}{% break %}{% endif %}\n    {% endfor %}\n{{ eos_token }}{% endfor %}"
    "{% generation %}{{ tools }}{% endgeneration %}{{ strftime_now('%Y') }}"
)
STRING_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}assistant:"
TEMPLATES = {"none": None, "llava": LLAVA_TEMPLATE, "bos": BOS_TEMPLATE}
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
KINDS = {
    "byte-level": (byte_level, {"bos_token": None, "eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}),
    "llama": (llama, LLAMA_TOKENS | {"pad_token": "<pad>", "tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "llama, legacy": (llama_legacy, LLAMA_TOKENS | {"tokenizer_class": "LlamaTokenizerFast"}),
    "unigram": (unigram, LLAMA_TOKENS | {"bos_token": {"content": "<s>", "__type": "AddedToken"}}),
}
PROMPTS = ["What is in this picture?", " Größe, 世界 and 😀?\n\nSecond line  ", "a", "1 < 2 > 0 <imag e>"]


def write(path: Path, content: Any) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def model_directory(path: Path, kind: str = "llama", template: str | None = LLAVA_TEMPLATE) -> Path:
    build, tokenizer_config = KINDS[kind]
    path.mkdir(exist_ok=True)
    write(path / "tokenizer.json", build().to_str())
    write(path / "tokenizer_config.json", tokenizer_config)
    write(path / "config.json", {"model_type": "llava", "text_config": {"model_type": "llama"}})
    write(path / "preprocessor_config.json", IMAGE_SETTINGS)
    processor = {"processor_class": "LlavaProcessor", "patch_size": PATCH, "num_additional_image_tokens": 1}
    write(path / "processor_config.json", processor | {"vision_feature_select_strategy": "default"})
    if template is not None:
        write(path / "chat_template.jinja", template)
    return path


def image_id(kind: str = "llama") -> int:
    return KINDS[kind][0]().token_to_id("<image>")


def open_processor(path: Path, kind: str = "llama", **changes: Any) -> Processor:
    arguments = {
        "image_token_id": image_id(kind),
        "tokens_per_image": TOKENS,
        "vocab_size": VOCAB_SIZE,
        "image_size": EDGE,
    }
    return Processor.open(path, **(arguments | changes))


def pictures(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(number)
    return [Image.fromarray(rng.integers(0, 256, (50 + i, 70, 3), dtype=np.uint8)) for i in range(number)]


def reference(path: Path, images: list[Image.Image], prompt: str, system: str | None, template: bool) -> Any:
    """What transformers makes of the same messages."""
    from transformers import LlavaProcessor

    processor = LlavaProcessor.from_pretrained(path)
    if not template:
        text = f"{system} " * bool(system) + "USER: " + "<image>\n" * len(images) + prompt + " ASSISTANT:"
        return processor(images=images or None, text=text)
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages.append({"role": "user", "content": parts})
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)


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
            assert np.array_equal(got.pixel_values, np.stack(expected["pixel_values"]))
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
    assert len(prompt.spans) == len(prompt.pixel_values) == 3
    for span, pixels in zip(prompt.spans, prompt.pixel_values, strict=True):
        assert span.length == TOKENS
        assert set(prompt.token_ids[span.start : span.start + TOKENS]) == {image_id()}
        assert span.digest == digest(pixels)
    assert [b.start - a.start for a, b in zip(prompt.spans, prompt.spans[1:], strict=False)] == [TOKENS, TOKENS]
    assert prompt.spans[0].digest == prompt.spans[2].digest != prompt.spans[1].digest
    assert prompt.pixel_values.dtype == np.float32


def test_detokenizer_skips_special_tokens(tmp_path: Path) -> None:
    processor = open_processor(model_directory(tmp_path))
    detokenizer = processor.detokenizer()
    ids = processor([], "two dogs").token_ids
    text = "".join(map(detokenizer.push, [*ids, image_id(), 2])) + detokenizer.finish()
    assert text == "USER: two dogs ASSISTANT:"
    assert processor.detokenizer() is not detokenizer


# --- templates ---


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
        assert open_processor(path).template.render(1, "Hi", None) == "USER: <image>\nHi ASSISTANT:"
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
        assert open_processor(path).template.render(0, "Hi", None).startswith(f"{name}: ")


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
    with pytest.raises(BadModel, match="system role not supported"):
        processor(pictures(1), "Hi", "Be brief.")


def test_named_templates_without_default_are_refused(tmp_path: Path) -> None:
    path = model_directory(tmp_path, template=None)
    write(path / "chat_template.json", {"chat_template": [{"name": "rag", "template": "x"}]})
    with pytest.raises(BadModel, match='no chat template named "default", only: rag'):
        open_processor(path)


# --- prompts that are refused ---


@pytest.mark.parametrize("kind", KINDS)
def test_bad_prompts_are_refused(tmp_path: Path, kind: str) -> None:
    processor = open_processor(model_directory(tmp_path, kind), kind)
    eos = processor.text.named["eos_token"]
    for prompt, reason in {
        "": "the prompt is empty",
        " \n\t": "the prompt is empty",
        "look: <image>": "the prompt contains <image>",
        f"stop {eos} now": f"contains {eos.replace('|', '.')}",
        "broken \udc80": "not valid Unicode",
    }.items():
        with pytest.raises(BadInput, match=reason):
            processor(pictures(1), prompt)
    with pytest.raises(BadInput, match="the system text contains <image>"):
        processor(pictures(1), "What is this?", "You see <image>.")
    with pytest.raises(BadImage):
        processor([b"no picture"], "What is this?")


def test_other_spellings_of_the_placeholder_are_refused(tmp_path: Path) -> None:
    """Compatibility normalization turns fullwidth brackets into plain ones, after any search in the text."""
    processor = open_processor(model_directory(tmp_path, "unigram"), "unigram")
    fullwidth = "\uff1cimage\uff1e"
    assert image_id("unigram") in unigram().encode(fullwidth).ids
    with pytest.raises(BadInput, match="contains <image>"):
        processor(pictures(1), fullwidth)


def test_a_placeholder_in_two_halves_is_refused(tmp_path: Path) -> None:
    joined = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
    processor = open_processor(model_directory(tmp_path, template=joined))
    with pytest.raises(BadInput, match="wrote 1 image placeholders for 0 images"):
        processor([], "age> hello", "<im")


def test_any_prompt_has_exactly_the_given_images_or_is_refused(tmp_path: Path) -> None:
    processors = {kind: open_processor(model_directory(tmp_path / kind, kind), kind) for kind in KINDS}
    text = st.text(max_size=20) | st.lists(st.sampled_from(["<image", "<image>", ">", "<s>", " a"])).map("".join)

    @settings(max_examples=100, deadline=None)
    @given(st.sampled_from(list(KINDS)), text, st.none() | text, st.integers(0, 2))
    def check(kind: str, prompt: str, system: str | None, number: int) -> None:
        with suppress(BadInput):
            got = processors[kind](pictures(number), prompt, system)
            assert got.token_ids.count(image_id(kind)) == number * TOKENS
            assert len(got.spans) == number

    check()


# --- models that are refused ---


def test_missing_and_broken_files_are_a_bad_model(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="is not a directory"):
        open_processor(tmp_path / "none")
    for name, reason in {
        "tokenizer.json": r"tokenizer\.json is missing",
        "preprocessor_config.json": r"has no preprocessor_config\.json",
    }.items():
        path = model_directory(tmp_path)
        (path / name).unlink()
        with pytest.raises(BadModel, match=reason):
            open_processor(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "preprocessor_config.json"):
        for content in ("{", "[1]", "\ufeff{"):
            path = model_directory(tmp_path)
            write(path / name, content)
            with pytest.raises(BadModel, match=name.replace(".", r"\.")):
                open_processor(path)
    path = model_directory(tmp_path)
    write(path / "tokenizer.json", Tokenizer.from_str('{"model":{"type":"BPE","vocab":{},"merges":[]}}').to_str())
    with pytest.raises(BadModel, match="has no tokens"):
        open_processor(path)


def test_mismatches_are_a_bad_model_with_the_numbers(tmp_path: Path) -> None:
    path = model_directory(tmp_path)
    highest = llama().get_vocab_size() - 1
    with pytest.raises(BadModel, match=f"token ids up to {highest}, but the model's vocabulary has 300 entries"):
        open_processor(path, vocab_size=300)
    with pytest.raises(BadModel, match=f"takes token 7 as the image .* has '<0x04>' there, .* as token {image_id()}"):
        open_processor(path, image_token_id=7)
    with pytest.raises(BadModel, match="takes token -200 as the image placeholder"):
        open_processor(path, image_token_id=-200)
    with pytest.raises(BadModel, match="at least 1 token, not 0"):
        open_processor(path, tokens_per_image=0)
    with pytest.raises(BadModel, match=r"pictures of 56 x 56 pixels .* takes 336 x 336"):
        open_processor(path, image_size=336)
    write(path / "preprocessor_config.json", IMAGE_SETTINGS | {"do_center_crop": False})
    with pytest.raises(BadModel, match="gives every picture another size"):
        open_processor(path)


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


# --- end of the answer ---


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 5]}, {"eos_token_id": 7}, {2, 5}),
        ({"eos_token_id": 9}, {}, {9}),
        ({}, {"eos_token_id": 7, "text_config": {"eos_token_id": 8}}, {7}),
        (None, {"text_config": {"eos_token_id": 8}}, {8}),
        (None, {"text_config": {"eos_token_id": None}}, {2}),
    ],
)
def test_eos_token_ids(tmp_path: Path, generation: Any, config: Any, expected: set[int]) -> None:
    path = model_directory(tmp_path)
    write(path / "config.json", config)
    if generation is not None:
        write(path / "generation_config.json", generation)
    assert open_processor(path).eos_token_ids == frozenset(expected)


def test_eos_token_ids_outside_of_the_vocabulary_are_refused(tmp_path: Path) -> None:
    path = model_directory(tmp_path)
    for value in (VOCAB_SIZE, -1, "2", [2, True]):
        write(path / "generation_config.json", {"eos_token_id": value})
        with pytest.raises(BadModel, match="is no token id of a vocabulary of 420"):
            open_processor(path)
