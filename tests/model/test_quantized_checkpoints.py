"""Quantised checkpoints of other projects: their numbers are those of the documented layout, and the model's logits and
tokens are transformers' with these numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from avl_edge import BadModel, Options, Runtime
from avl_edge.backends.cuda.model import DeviceWeights
from avl_edge.model.checkpoint import load_weights, stored_dtype
from avl_edge.model.weights import Dense, Grouped, QuantFormat, StoredLayer, quant_format
from tests.conftest import Checkpoints
from tests.equipment import quantized
from tests.equipment.checkpoints import random_image
from tests.equipment.pixels import stacked
from tests.equipment.quantized import Array, Codes, compressed_section, round_to_nearest
from tests.equipment.recorder import Recorder

TOKENS = 32


def _section(method: str, **values: Any) -> dict[str, Any]:
    return {"quant_method": method, "bits": 4, "group_size": 32, **values}


def _codes(bits: int, group: int, symmetric: bool, shuffled: bool = False) -> Callable[[Array], Codes]:
    rng = np.random.default_rng(7) if shuffled else None
    return lambda weight: round_to_nearest(weight, bits, group or weight.shape[1], symmetric=symmetric, shuffled=rng)


GPTQ1, GPTQ2 = partial(quantized.gptq, version=1), partial(quantized.gptq, version=2)
Pack = Callable[[Codes], dict[str, Tensor]]
FORMATS: dict[str, tuple[Callable[[Array], Codes], Pack, dict[str, Any]]] = {
    "pack-4": (_codes(4, 32, True), quantized.pack_quantized, compressed_section(4, 32, symmetric=True)),
    "pack-4-zeros": (_codes(4, 64, False), quantized.pack_quantized, compressed_section(4, 64, symmetric=False)),
    "pack-4-order": (_codes(4, 32, True, True), quantized.pack_quantized, compressed_section(4, 32, symmetric=True)),
    "pack-4-channel": (_codes(4, 0, True), quantized.pack_quantized, compressed_section(4, 0, symmetric=True)),
    "pack-8": (_codes(8, 0, True), quantized.pack_quantized, compressed_section(8, 0, symmetric=True)),
    "int-8": (
        _codes(8, 0, True),
        quantized.int_quantized,
        compressed_section(8, 0, symmetric=True, kind="int-quantized"),
    ),
    "awq": (_codes(4, 64, False), quantized.awq, _section("awq", version="gemm", zero_point=True)),
    "gptq": (_codes(4, 32, False), GPTQ1, _section("gptq", desc_act=False, checkpoint_format="gptq")),
    "gptq-order": (_codes(4, 32, True, True), GPTQ1, _section("gptq", desc_act=True)),
    "gptq-2": (_codes(4, 64, False, True), GPTQ2, _section("gptq", desc_act=True, checkpoint_format="gptq_v2")),
    "gptq-8": (_codes(8, 32, True), GPTQ1, _section("gptq", bits=8)),
    "round-gptq": (_codes(4, 32, False), GPTQ1, _section("auto-round", packing_format="auto_round:auto_gptq")),
    "round": (_codes(4, 32, False), GPTQ2, _section("auto-round", packing_format="auto_round")),
    "round-awq": (_codes(4, 32, False), quantized.awq, _section("auto-round", packing_format="auto_round:auto_awq")),
}


@pytest.mark.parametrize("source", ["mistral-gqa", "qwen2-gqa"])
@pytest.mark.parametrize("name", FORMATS)
def test_logits_and_tokens_are_those_of_the_numbers(
    checkpoint: Checkpoints, tmp_path: Path, name: str, source: str
) -> None:
    directory, plain = quantized.quantized_copy(checkpoint(source), tmp_path, *FORMATS[name])
    runtime = Runtime.load(directory, threaded=False)
    record = Recorder(runtime)
    request = runtime.prepare(
        [random_image(1, (70, 90))], "What is shown?", Options(method="full", max_new_tokens=TOKENS)
    )
    ids, pixels = torch.tensor([request.prompt.token_ids]), torch.from_numpy(stacked(request.prompt))
    tokens = list(runtime.submit(request).result().token_ids)
    model = LlavaForConditionalGeneration.from_pretrained(plain).eval()
    with torch.no_grad():
        expected = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=TOKENS, do_sample=False)
        logits = model(input_ids=expected, pixel_values=pixels).logits[0, ids.shape[1] - 1 : -1]
    assert tokens == expected[0, ids.shape[1] :].tolist()
    assert (torch.stack(record.logits) - logits).abs().max() <= 2e-4


def _layer(parts: dict[str, Tensor], outputs: int, inputs: int) -> StoredLayer:
    return StoredLayer("layer", outputs, inputs, {f"layer.{part}": each for part, each in parts.items()})


def _format(section: dict[str, Any]) -> QuantFormat:
    found = quant_format({"quantization_config": section})
    assert found is not None
    return found


@given(
    st.integers(0, 1 << 16),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([32, 64, 128, 256]),
    st.integers(1, 3),
    st.integers(1, 5),
)
def test_every_number_is_read(seed: int, name: str, group: int, groups: int, outputs: int) -> None:
    """Of random codes, scales and zero points; AWQ and GPTQ have outputs in words."""
    codes_of, parts_of, section = FORMATS[name]
    like = codes_of(np.ones((8, 64)))
    rng = np.random.default_rng(seed)
    outputs = outputs if section["quant_method"] == "compressed-tensors" else 8 * outputs
    groups, group = (1, group * groups) if len(like.scales[0]) == 1 else (groups, group)
    group_of = np.arange(groups * group) // group
    drawn = Codes(
        rng.integers(0, 2**like.bits, (outputs, groups * group)),
        rng.uniform(1e-3, 4, (outputs, groups)).astype(np.float16),
        rng.integers(0, 16, (outputs, groups))
        if "zeros" in name or name in ("awq", "gptq", "round")
        else (np.full((outputs, groups), 2 ** (like.bits - 1))),
        (rng.permutation(group_of) if "order" in name or name == "gptq-2" else group_of).astype(np.int32),
        like.bits,
    )
    packed = _format(section).read(_layer(parts_of(drawn), outputs, groups * group))
    np.testing.assert_array_equal(packed.dequantize().numpy(), drawn.values.astype(np.float32))
    # What the format has is what is held: codes in their width, and a scale for each group that kernels know.
    assert packed.codes.nbytes == drawn.numbers.size * like.bits // 8


def test_four_bit_codes_of_compressed_tensors_are_the_file_itself(checkpoint: Checkpoints, tmp_path: Path) -> None:
    directory, _ = quantized.quantized_copy(checkpoint("mistral-gqa"), tmp_path, *FORMATS["pack-4"])
    layer = load_weights(directory).linear("text.layers.0.mlp.down_proj", 64, 128)
    assert isinstance(layer, Grouped)
    with open("/proc/self/maps") as maps:
        spans = [[int(edge, 16) for edge in line.split()[0].split("-")] for line in maps if str(directory) in line]
    assert any(start <= layer.codes.data_ptr() < end for start, end in spans)


def test_a_layer_is_what_its_tensors_are(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Layers that the config means to be quantised may be plain, and quantised ones be in a list of plain ones."""
    directory, plain = quantized.quantized_copy(checkpoint("mistral-gqa"), tmp_path, *FORMATS["awq"])
    tensors, values = load_file(directory / "model.safetensors"), load_file(plain / "model.safetensors")
    stem = next(name for name in values if name.endswith("layers.0.mlp.up_proj.weight")).removesuffix(".weight")
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"{stem}.{part}"]
    tensors[f"{stem}.weight"] = values[f"{stem}.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    weights = load_weights(directory)
    assert isinstance(weights.linear("text.layers.0.mlp.up_proj", 128, 64), Dense)
    assert isinstance(weights.linear("text.layers.1.mlp.up_proj", 128, 64), Grouped)


SECTIONS = [
    ({"quant_method": "fp8"}, "quant_method 'fp8' is none of compressed-tensors, awq, gptq, auto-round: make"),
    ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is none of"),
    ({"quant_method": "gguf"}, "quant_method 'gguf' is none of"),
    ({"quant_method": ["awq"]}, "is none of"),
    ({"bits": 4}, "quant_method None is none of"),
    ("awq", "quantization_config must be an object"),
    ({"quant_method": "awq", "version": "gemv"}, "layout 'gemv' is not served, only gemm"),
    ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "layout 'marlin' is not served"),
    ({"quant_method": "auto-round", "packing_format": "auto_round:fp8_static"}, "packing_format"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "'float-quantized', which is not served"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
    (
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {"group_0": {"format": "float-quantized"}},
        },
        "'float-quantized'",
    ),
    (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse \\('sparse-24-bitmask'\\)",
    ),
    ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}, "rotated activations"),
]


@pytest.mark.parametrize(("section", "reason"), SECTIONS)
def test_formats_that_are_not_served_are_refused_by_name(section: Any, reason: str) -> None:
    with pytest.raises(BadModel, match=reason) as caught:
        quant_format({"quantization_config": section})
    assert "\n" not in str(caught.value)


def _without(part: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda parts: parts.__delitem__(part)


def _as(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda parts: parts.update({part: change(parts[part])})


DAMAGE: list[tuple[str, Callable[[dict[str, Tensor]], None], str]] = [
    ("pack-4", _without("weight_scale"), "layer.weight_scale is missing"),
    ("pack-4", _without("weight_shape"), "layer.weight_shape is missing"),
    ("pack-4", _as("weight_packed", lambda t: t[:, :-1]), r"layer.weight_packed has shape \[8, 15\]"),
    ("pack-4", _as("weight_packed", lambda t: t.view(torch.uint8)), "layer.weight_packed is stored as torch.uint8"),
    ("pack-4", _as("weight_scale", lambda t: t[:, :3]), "layer.weight_scale has 3 groups, which do not divide 128"),
    ("pack-4", _as("weight_scale", lambda t: t[:4]), r"layer.weight_scale has shape \[4, 4\]"),
    ("pack-4", _as("weight_scale", lambda t: t.repeat(1, 2)), "has a scale for 16 inputs; 4-bit weights need"),
    ("pack-4", _as("weight_scale", lambda t: t.float().to(torch.float8_e4m3fn)), "stored as torch.float8_e4m3fn"),
    ("pack-4", _as("weight_scale", lambda t: t[0]), r"layer.weight_scale has shape \[4\]"),
    ("pack-4", _as("weight_shape", lambda t: t + 1), r"layer.weight_shape says \[9, 129\]"),
    ("pack-4", lambda parts: parts.update(weight_global_scale=torch.ones(1)), "4-bit float format"),
    ("pack-4-zeros", _as("weight_zero_point", lambda t: t[:0]), "layer.weight_zero_point has shape"),
    ("pack-4-order", _as("weight_g_idx", lambda t: t + 1), "layer.weight_g_idx names a group that is none of 4"),
    ("pack-4-order", _as("weight_g_idx", lambda t: t * 0), "does not give 32 inputs to each of 4 groups"),
    ("int-8", _as("weight", lambda t: t.view(torch.float8_e4m3fn)), "layer.weight is stored as torch.float8_e4m3fn"),
    ("int-8", _without("weight"), "layer.weight is missing"),
    ("int-8", lambda parts: parts.update(weight_zero_point=torch.ones(8, 1, dtype=torch.int8)), "zero points"),
    ("awq", _without("scales"), "layer.scales is missing"),
    ("awq", _without("qzeros"), "layer.qzeros is missing"),
    ("awq", _as("qweight", lambda t: t.T.contiguous()), r"layer.qweight has shape \[1, 128\]"),
    ("awq", _as("qzeros", lambda t: t.float()), "layer.qzeros is stored as torch.float32"),
    ("gptq", _as("scales", lambda t: t[:3]), "layer.scales has 3 groups"),
    ("gptq", _as("qweight", lambda t: t[:12]), r"layer.qweight has shape \[12, 8\]"),
    ("gptq", _as("g_idx", lambda t: t[:5]), r"layer.g_idx has shape \[5\]"),
    ("gptq-8", _as("qzeros", lambda t: t + 1), "8-bit weights with zero points"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE)
def test_tensors_that_do_not_fit_are_named(name: str, damage: Callable[[dict[str, Tensor]], None], reason: str) -> None:
    codes_of, parts_of, section = FORMATS[name]
    parts = parts_of(codes_of(np.random.default_rng(1).standard_normal((8, 128))))
    damage(parts)
    with pytest.raises(BadModel, match=reason) as caught:
        _format(section).read(_layer(parts, 8, 128))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("layer.")


def test_a_format_is_refused_before_weights_are_read(checkpoint: Checkpoints, tmp_path: Path) -> None:
    section = {"quant_method": "fp8"}
    directory, _ = quantized.quantized_copy(checkpoint("mistral-gqa"), tmp_path, *FORMATS["awq"][:2], section)
    with pytest.raises(BadModel, match="quant_method 'fp8'"):
        stored_dtype(directory)
    with pytest.raises(BadModel, match="quant_method 'fp8'"):
        Runtime.open(directory)


def test_quantised_tensors_without_a_config_are_named(checkpoint: Checkpoints, tmp_path: Path) -> None:
    directory, _ = quantized.quantized_copy(checkpoint("mistral-gqa"), tmp_path, *FORMATS["awq"])
    (directory / "config.json").write_text((checkpoint("mistral-gqa") / "config.json").read_text())
    with pytest.raises(BadModel, match=r"q_proj\.qweight .* no quantization_config"):
        load_weights(directory).linear("text.layers.0.self_attn.q_proj", 64, 64)


def test_a_device_gets_the_packed_layers(checkpoint: Checkpoints, tmp_path: Path) -> None:
    directory, _ = quantized.quantized_copy(checkpoint("mistral-gqa"), tmp_path, *FORMATS["gptq-order"])
    weights = load_weights(directory)
    own = weights.linear("text.layers.0.mlp.down_proj", 64, 128)
    there = DeviceWeights(weights, torch.device("meta")).linear("text.layers.0.mlp.down_proj", 64, 128)
    assert isinstance(there, Grouped)
    assert there.nbytes == own.nbytes
    assert there.codes.is_meta
    assert there.order is not None
    assert there.order.is_meta


def test_a_folder_of_gguf_is_refused_by_name(checkpoint: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint("mistral-gqa") / "config.json").read_text())
    (tmp_path / "model-q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadModel, match="holds GGUF files"):
        load_weights(tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_package_compressed_tensors_packs_alike(bits: int, symmetric: bool) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="needs the package compressed-tensors, of the dev extra",
    )
    codes = round_to_nearest(np.random.default_rng(2).standard_normal((11, 96)), bits, 32, symmetric=symmetric)
    parts, offset = quantized.pack_quantized(codes), 1 << (bits - 1)
    theirs = helpers.pack_to_int32(torch.from_numpy(codes.numbers - offset).to(torch.int8), bits)
    assert torch.equal(theirs, parts["weight_packed"])
    if not symmetric:
        zeros = helpers.pack_to_int32(torch.from_numpy(codes.zeros - offset).to(torch.int8), bits, packed_dim=0)
        assert torch.equal(zeros, parts["weight_zero_point"])
