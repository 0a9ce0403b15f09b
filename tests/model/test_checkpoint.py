"""Broken checkpoints are refused by name, before any work, without a trace of ours."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from avl_edge import BadModel, Options, Runtime
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.recorder import Recorder


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint of its own to damage."""
    return Path(shutil.copytree(checkpoint("mistral-gqa"), tmp_path / "model"))


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


CONFIG_DAMAGE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.update(model_type="pixtral"), "it must be one of llava"),
    (lambda c: c.pop("text_config"), "has no text_config"),
    (lambda c: c.pop("vision_config"), "has no vision_config"),
    (lambda c: c.update(vision_config=[]), "has no vision_config"),
    (lambda c: c["text_config"].update(hidden_size="64"), "hidden_size must be a positive whole number, not '64'"),
    (lambda c: c["text_config"].update(num_hidden_layers=0), "num_hidden_layers must be a positive"),
    (lambda c: c["text_config"].update(num_key_value_heads=3), "is not a multiple of num_key_value_heads 3"),
    (lambda c: c["text_config"].pop("hidden_size"), "config.json asks for"),
    (lambda c: c["text_config"].update(model_type="gemma"), "'gemma' is not supported"),
    (lambda c: c["text_config"].update(hidden_act="swish9"), "'swish9' is not supported"),
    (lambda c: c["text_config"].update(rope_parameters={"rope_type": "longrope"}), "'longrope' is not supported"),
    (lambda c: c["text_config"].update(rope_parameters={"rope_type": "linear"}), "lacks a parameter"),
    (lambda c: c["text_config"].update(rope_parameters="none"), "rope_scaling must be an object"),
    (lambda c: c.update(vision_feature_layer=9), "outside a tower of 3 layers"),
    (lambda c: c.update(vision_feature_select_strategy="cls"), "must be one of default, full"),
    (lambda c: c.update(image_token_index=7), "placeholder"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_DAMAGE)
def test_damaged_config(copy: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    _edit(copy / "config.json", change)
    with pytest.raises(BadModel, match=message):
        Runtime.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\x01", '{"model_type": "llava"'])
def test_config_that_is_no_json_object(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(BadModel, match=r"config\.json"):
        Runtime.open(copy)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
def test_missing_files_are_named(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(BadModel, match=file if file != "processor_config.json" else "preprocessor_config"):
        Runtime.open(copy)


@pytest.mark.parametrize("keep", [0, 4, 100, 2000, -1])
def test_safetensors_cut_off(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadModel, match="damaged or cut off"):
        Runtime.open(copy)


def test_safetensors_with_a_wrong_shape_a_missing_tensor_and_a_wrong_type(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = "language_model.model.layers.1.mlp.up_proj.weight"

    save_file({**tensors, name: tensors[name][:-1].clone()}, path)
    with pytest.raises(BadModel, match=r"text\.layers\.1\.mlp\.up_proj\.weight has shape \[127, 64\].*\[128, 64\]"):
        Runtime.load(copy)
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(BadModel, match=r"no weights for text\.layers\.1\.mlp\.up_proj\.weight"):
        Runtime.load(copy)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path)
    with pytest.raises(BadModel, match=r"stored as torch\.int8"):
        Runtime.load(copy)


def test_an_index_that_lies(checkpoint: Checkpoints, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint("mistral-gqa", max_shard_size="100KB"), tmp_path / "model"))
    index = copy / "model.safetensors.index.json"
    original = index.read_text()
    name = "language_model.model.norm.weight"

    _edit(index, lambda document: document["weight_map"].update({name: "../elsewhere.safetensors"}))
    with pytest.raises(BadModel, match="outside of its directory"):
        Runtime.open(copy)
    index.write_text(original)
    _edit(index, lambda document: document["weight_map"].update({name: "model-99999.safetensors"}))
    with pytest.raises(BadModel, match=r"model-99999\.safetensors is missing"):
        Runtime.load(copy)
    index.write_text(original)
    first = sorted(copy.glob("*.safetensors"))[0].name
    _edit(index, lambda document: document["weight_map"].update({"ghost.weight": first}))
    Runtime.load(copy).close()  # which nobody needs
    index.write_text("{}")
    with pytest.raises(BadModel, match="no weight_map"):
        Runtime.open(copy)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(BadModel, match=r"no model\.safetensors and .*, but pickled weights, .* convert them"):
        Runtime.open(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(BadModel, match=r"no model\.safetensors\.index\.json$"):
        Runtime.open(copy)


def test_mixed_dtypes_follow_the_embedding(copy: Path) -> None:
    path = copy / "model.safetensors"
    name = "language_model.model.norm.weight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].to(torch.bfloat16)}, path)
    weights = load_weights(copy)
    assert weights.take("text.norm.weight").dtype == weights.dtype == torch.float32


def test_the_default_fields_of_a_published_checkpoint(copy: Path) -> None:
    """LLaVA-1.5-7B's text_config holds little more than its context and vocabulary; the rest is LlamaConfig's."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064, "rms_norm_eps": 1e-5}
    _edit(copy / "config.json", lambda config: config.update(text_config=text, tie_word_embeddings=False))
    spec = read_spec(copy).text
    assert (spec.hidden_size, spec.layers, spec.heads, spec.kv_heads, spec.head_dim) == (4096, 32, 32, 32, 128)
    assert (spec.intermediate_size, spec.context, spec.vocab_size) == (11008, 4096, 32064)
    assert spec.kv_shape(2).row_bytes * spec.layers == 524_288


def test_a_sliding_window_ends_the_context(copy: Path) -> None:
    _edit(copy / "config.json", lambda config: config["text_config"].update(sliding_window=128))
    assert read_spec(copy).text.context == 128


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 4000), byte=st.integers(0, 255))
def test_a_flipped_byte_in_a_header_is_refused_or_harmless(copy: Path, position: int, byte: int) -> None:
    path = copy / "model.safetensors"
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[position] = byte
    path.write_bytes(damaged)
    with contextlib.suppress(BadModel):
        Runtime.load(copy)
    path.write_bytes(original)


LAYOUTS = {
    "as LLaVA's authors": {"vision_tower.": "vision_tower.vision_model."},
    "decoder inside": {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "flat tower inside": {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_names_is_the_same_model(copy: Path, layout: str) -> None:
    """transformers has written its parts under four sets of names; the checkpoints here have the newest one."""

    def logits() -> torch.Tensor:
        runtime = Runtime.load(copy)
        record = Recorder(runtime)
        runtime.generate([random_image(1, 60)], "What is shown?", Options(max_new_tokens=4)).result()
        return torch.stack(record.logits)

    expected, file = logits(), copy / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for old, new in LAYOUTS[layout].items():
        assert any(name.startswith(old) for name in tensors)
        tensors = {new + name[len(old) :] if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(tensors, file)
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-5)  # other places in the file, other alignment


def test_biases_that_the_config_does_not_know_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Left out in silence they would give another model; so would biases that are asked for and missing."""
    copy = Path(shutil.copytree(checkpoint("llama-bias"), tmp_path / "model"))
    _edit(copy / "config.json", lambda c: c["text_config"].update(attention_bias=False))
    with pytest.raises(BadModel, match=r"bias, which config\.json says the model does not"):
        Runtime.load(copy)


def test_biases_that_are_missing_are_refused(copy: Path) -> None:
    _edit(copy / "config.json", lambda c: c["text_config"].update(model_type="qwen2"))
    with pytest.raises(BadModel, match=r"no weights for .*bias"):
        Runtime.load(copy)


def test_a_sliding_window_that_is_switched_off_does_not_end_the_context(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Qwen2 writes its window down even where it does not use it."""
    copy = Path(shutil.copytree(checkpoint("qwen2-gqa"), tmp_path / "model"))
    for used, context in ((False, 512), (True, 100)):
        _edit(copy / "config.json", lambda c, u=used: c["text_config"].update(sliding_window=100, use_sliding_window=u))
        assert read_spec(copy).text.context == context


def test_progress_counts_every_tensor(copy: Path) -> None:
    seen: list[tuple[int, int]] = []
    Runtime.load(copy, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, len(seen)) for i in range(1, len(seen) + 1)]
    assert len(seen) == len(load_file(copy / "model.safetensors"))


WRONG_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_field_is_read_or_refused(copy: Path, data: st.DataObject) -> None:
    """No config.json ends in anything but a spec or BadModel."""
    path = copy / "config.json"
    original = path.read_text()
    document = json.loads(original)
    part = data.draw(st.sampled_from([document, document["text_config"], document["vision_config"]]))
    field = data.draw(st.sampled_from(sorted(part)))
    part[field] = data.draw(WRONG_VALUES)
    path.write_text(json.dumps(document))
    try:
        with contextlib.suppress(BadModel):
            read_spec(copy)
    finally:
        path.write_text(original)
