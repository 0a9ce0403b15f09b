"""The random checkpoints on which the oracle runs: transformers reads them, and their answers vary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.equipment.checkpoints import SPECS, TOKENIZER_SIZE, make_checkpoint
from tests.equipment.oracle import generate, load_model
from tests.equipment.oracle_cases import ALL, EVERYTHING, TWO_IMAGES, Cases, tokens


def test_the_specs_cover_what_they_should() -> None:
    specs = list(SPECS.values())
    assert {spec.text for spec in specs} == {"llama", "mistral", "qwen2"}
    assert {spec.feature_layer for spec in specs} == {-1, -2, (-3, -1)}
    assert {spec.strategy for spec in specs} == {"default", "full"}
    assert {spec.dtype for spec in specs} == {torch.float32, torch.bfloat16}
    assert {spec.tied for spec in specs} == {spec.kv_heads < spec.heads for spec in specs} == {False, True}
    assert {(spec.rope_scaling or {}).get("rope_type") for spec in specs} >= {None, "llama3", "linear", "yarn"}


@ALL
def test_a_checkpoint_reloads(name: str, case: Cases) -> None:
    made, spec = case(name), SPECS[name]
    stored = LlavaForConditionalGeneration.from_pretrained(made.directory)
    assert stored.dtype == spec.dtype
    tied = stored.lm_head.weight.data_ptr() == stored.model.language_model.embed_tokens.weight.data_ptr()
    assert tied == spec.tied
    assert len(made.processor.tokenizer) == TOKENIZER_SIZE
    input_ids, pixel_values = made.inputs(TWO_IMAGES)
    assert (input_ids == stored.config.image_token_id).sum() == 2 * spec.image_tokens
    assert pixel_values.shape == (2, 3, spec.image_size, spec.image_size)


def test_a_sharded_checkpoint_holds_the_same_weights(tmp_path: Path, case: Cases) -> None:
    directory = make_checkpoint(tmp_path, SPECS["llama-mha"], max_shard_size="200KB")
    assert (directory / "model.safetensors.index.json").is_file()
    assert len(list(directory.glob("*.safetensors"))) > 2
    expected = case("llama-mha").model.state_dict()
    found = load_model(directory).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["llama-mha", "qwen2-gqa"])
def test_the_tokenizer_gives_text_back(name: str, case: Cases) -> None:
    tokenizer = case(name).processor.tokenizer
    text = "Where is the zebra? Größe 12 — 北"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (ids[0] == tokenizer.bos_token_id) == (name == "llama-mha")


@ALL
def test_decoding_varies_and_depends_on_the_picture(name: str, case: Cases) -> None:
    made = case(name)
    input_ids, pixel_values = made.inputs()
    steps = generate(made.model, input_ids, pixel_values, EVERYTHING, 16)
    assert len(set(tokens(steps))) >= 6
    assert not set(tokens(steps)) & set(made.processor.tokenizer.all_special_ids)
    other = generate(made.model, input_ids, pixel_values.flip(-1), EVERYTHING, 16)
    assert (steps[0].logits - other[0].logits).abs().max() > 0.1
