"""Models by their sizes, against transformers (parameters, image tokens) and the published figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from avl_edge.errors import BadInput, BadModel
from avl_edge.model.families import read_spec
from avl_edge.model.families.llava_next.pictures import AnyRes
from avl_edge.model.known import KNOWN, known_shape, shape_of_checkpoint
from avl_edge.model.sizes import PRECISIONS, Precision
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import SPECS

VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32064}
VICUNA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32064,
}


def _qwen_text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "head_dim": 128,
    }


def _qwen25_vision(hidden: int) -> dict[str, int]:
    return {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "out_hidden_size": hidden}


def _qwen3_vision(width: int, inner: int, depth: int, hidden: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "depth": depth,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 16,
    }


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "llava-1.5-7b": ("Llava", VICUNA_7B, {}, False),
    "llava-1.5-13b": ("Llava", VICUNA_13B, {}, False),
    "llava-1.6-vicuna-7b": ("LlavaNext", VICUNA_7B, {}, False),
    "llava-1.6-vicuna-13b": ("LlavaNext", VICUNA_13B, {}, False),
    "qwen2-vl-2b": ("Qwen2VL", _qwen_text(1536, 8960, 28, 12, 2, 151936), {"hidden_size": 1536}, True),
    "qwen2-vl-7b": ("Qwen2VL", _qwen_text(3584, 18944, 28, 28, 4, 152064), {"hidden_size": 3584}, False),
    "qwen2.5-vl-3b": ("Qwen2_5_VL", _qwen_text(2048, 11008, 36, 16, 2, 151936), _qwen25_vision(2048), True),
    "qwen2.5-vl-7b": ("Qwen2_5_VL", _qwen_text(3584, 18944, 28, 28, 4, 152064), _qwen25_vision(3584), False),
    "qwen3-vl-2b": (
        "Qwen3VL",
        _qwen_text(2048, 6144, 28, 16, 8, 151936),
        _qwen3_vision(1024, 4096, 24, 2048),
        True,
    ),
    "qwen3-vl-4b": (
        "Qwen3VL",
        _qwen_text(2560, 9728, 36, 32, 8, 151936),
        _qwen3_vision(1024, 4096, 24, 2560),
        True,
    ),
    "qwen3-vl-8b": (
        "Qwen3VL",
        _qwen_text(4096, 12288, 36, 32, 8, 151936),
        _qwen3_vision(1152, 4304, 27, 4096),
        False,
    ),
}


INTERNVL = {
    "internvl3.5-1b": _qwen_text(1024, 3072, 28, 16, 8, 151936),
    "internvl3.5-2b": _qwen_text(2048, 6144, 28, 16, 8, 151936),
    "internvl3.5-4b": _qwen_text(2560, 9728, 36, 32, 8, 151936),
    "internvl3.5-8b": _qwen_text(4096, 12288, 36, 32, 8, 151936),
    "internvl3.5-14b": _qwen_text(5120, 17408, 40, 40, 8, 151936),
}


@pytest.mark.parametrize("name", INTERNVL)
def test_parameters_of_internvl_are_those_of_transformers(name: str) -> None:
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen3Config(**INTERNVL[name], tie_word_embeddings=False),
        vision_config={"attention_bias": True},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.InternVLForConditionalGeneration(config)
    assert known_shape(name).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    family, text, vision, tied = MODELS[name]
    if family.startswith("Llava"):
        config = getattr(transformers, f"{family}Config")(text_config=transformers.LlamaConfig(**text))
    else:
        config = getattr(transformers, f"{family}Config")(
            text_config={**text, "tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied
        )
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    assert known_shape(name).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "row_bytes"),
    [
        ("llava-1.5-7b", 524_288),
        ("llava-1.5-13b", 819_200),
        ("llava-1.6-vicuna-7b", 524_288),
        ("llava-1.6-vicuna-13b", 819_200),
        ("llava-1.6-mistral-7b", 131_072),
        ("qwen-vl", 524_288),
        ("qwen2-vl-2b", 28_672),
        ("qwen2-vl-7b", 57_344),
        ("qwen2.5-vl-3b", 36_864),
        ("qwen2.5-vl-7b", 57_344),
        ("qwen3-vl-2b", 114_688),
        ("qwen3-vl-4b", 147_456),
        ("qwen3-vl-8b", 147_456),
        ("internvl3.5-8b", 147_456),
    ],
)
def test_bytes_of_a_token_in_all_layers_as_published(name: str, row_bytes: int) -> None:
    shape = known_shape(name.upper()).kv_shape()
    assert shape.layers * shape.row_bytes == row_bytes


def test_all_known_models_are_compared() -> None:
    # Cosmos-Reason2 are Qwen3-VL models trained further.
    assert set(KNOWN) == {
        *MODELS,
        *INTERNVL,
        "qwen-vl",
        "llava-1.6-mistral-7b",
        "cosmos-reason2-2b",
        "cosmos-reason2-8b",
    }
    assert replace(KNOWN["cosmos-reason2-8b"], name="qwen3-vl-8b") == KNOWN["qwen3-vl-8b"]
    assert replace(KNOWN["cosmos-reason2-2b"], name="qwen3-vl-2b") == KNOWN["qwen3-vl-2b"]
    # The counts that the two models' files are published with.
    assert known_shape("qwen-vl").parameters == 9_656_935_168
    assert known_shape("llava-1.6-mistral-7b").parameters == 7_566_747_648
    assert known_shape("llava-1.5-7b").picture(1280, 960).tokens == 576
    assert known_shape("qwen-vl").picture(1280, 960).tokens == 256


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    [
        (375, 500, 2340),
        (500, 375, 2352),
        (672, 672, 2928),
        (336, 336, 1176),
        (1080, 1920, 1948),
        (2200, 1700, 2448),
    ],
)
def test_anyres_tokens_as_published(height: int, width: int, tokens: int) -> None:
    assert AnyRes()(width, height).tokens == tokens


_pixels = st.integers(30, 4000)


@given(width=_pixels, height=_pixels)
def test_anyres_tokens_are_those_of_transformers(width: int, height: int) -> None:
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 14, 1
    processor.vision_feature_select_strategy = "default"
    grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    processor.image_processor = type("Grids", (), {"image_grid_pinpoints": grids})()
    # The processor counts the class token, which its caller takes off again.
    expected = processor._get_number_of_features(height, width, 336, 336) - 1
    assert AnyRes()(width, height).tokens == expected


@given(width=_pixels, height=_pixels, name=st.sampled_from(["qwen2-vl-7b", "qwen3-vl-8b"]))
def test_merged_tokens_are_those_of_transformers(width: int, height: int, name: str) -> None:
    rule = known_shape(name).picture
    edge, low, high = (28, 56 * 56, 16384 * 28 * 28) if name == "qwen2-vl-7b" else (32, 256 * 256, 4096 * 4096)
    tall, wide = smart_resize(height, width, edge, low, high)
    assert rule(width, height).tokens == tall * wide // edge**2


def test_weights_in_other_formats() -> None:
    model = known_shape("llava-1.5-7b")
    body = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    head = 32064 * 4096
    whole = model.weight_bytes(Precision("fp16", "fp16"))
    assert whole == 2 * model.parameters
    assert whole - model.weight_bytes(Precision("int4", "fp16")) == round(body * (2 - 0.515625))
    assert model.step_bytes(Precision("fp16", "fp16")) == 2 * (body + head + 65 * 4096)
    assert list(PRECISIONS.values()) == sorted(PRECISIONS.values(), reverse=True)
    tied = known_shape("qwen2-vl-2b")
    copied = tied.weight_bytes(Precision("fp16", "int4")) - tied.weight_bytes(tied.stored)
    assert copied == round(151936 * 1536 * 0.515625)


def test_bad_names_and_formats(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"llava-1\.5-7b"):
        known_shape("llava-9")
    with pytest.raises(BadInput, match="int4"):
        Precision("int3", "fp16")
    with pytest.raises(BadInput, match="200 times"):
        known_shape("qwen2-vl-2b").picture(10_000, 20)
    with pytest.raises(BadModel, match="has no config"):
        shape_of_checkpoint(tmp_path, "nothing")


@pytest.mark.parametrize("name", ["mistral-gqa", "qwen2-tied", "llama-bf16", "llama-bias", "llama-gqa-full"])
def test_a_checkpoint_needs_no_weights(checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    directory = checkpoint(name)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    shape = shape_of_checkpoint(tmp_path, name)
    stored = json.loads((directory / "config.json").read_text())["dtype"]
    assert shape.itemsize == (2 if stored == "bfloat16" else 4)
    with torch.device("meta"):
        config = transformers.LlavaConfig.from_pretrained(directory)
        model = transformers.LlavaForConditionalGeneration(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.picture(640, 480).tokens == read_spec(tmp_path).tokens_per_image == SPECS[name].image_tokens


def test_a_checkpoint_of_another_dtype_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    config = json.loads((checkpoint("llama-mha") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "int8"}))
    with pytest.raises(BadModel, match="int8"):
        shape_of_checkpoint(tmp_path, "x")


def test_scales_in_float32() -> None:
    model = known_shape("llava-1.5-7b")
    body = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert model.float32_scale_bytes(Precision("fp16", "fp16")) == 0
    assert model.float32_scale_bytes(Precision("int4:32", "fp16")) == body // 16
    assert model.float32_scale_bytes(Precision("int4", "int4")) == (body + 32064 * 4096) // 64
