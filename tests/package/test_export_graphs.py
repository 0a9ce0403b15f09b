"""What the exported files are: the table of bindings, valid and repeatable ONNX."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch

import avl_edge.package.export
from avl_edge.errors import BadInput, BadModel
from avl_edge.model.families import read_spec
from avl_edge.model.spec import ModelSpec
from avl_edge.package.export import (
    DECODER,
    PLUGIN_DECODER,
    PRECISIONS,
    VISION,
    Bindings,
    Settings,
    decoder_bindings,
    export_model,
    plan_export,
    row_formats,
    vision_bindings,
)
from avl_edge.package.export.core_attention import WORDS
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import SPECS, make_checkpoint
from tests.equipment.quantized import gptq, quantized_copy, round_to_nearest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

Array = npt.NDArray[Any]
TYPES = {1: "float32", 6: "int32", 7: "int64", 10: "float16", 16: "bfloat16"}  # of onnx.TensorProto


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama-bias")


def export(directory: Path, out: Path, settings: Settings) -> ModelSpec:
    out.mkdir()
    spec = read_spec(directory)
    export_model(spec, directory, out, settings)
    return spec


def shape_of(value: Any) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("prune_after", [None, 2])
@pytest.mark.parametrize("name", ["llama-bias", "llama-mha"])
def test_graphs_are_valid_and_as_the_bindings_say(
    checkpoint: Checkpoints, tmp_path: Path, name: str, precision: str, prune_after: int | None
) -> None:
    out = tmp_path / "out"
    spec = export(checkpoint(name), out, Settings(precision, prune_after))
    bindings = {VISION: vision_bindings(spec, precision), DECODER: decoder_bindings(spec, precision, prune_after)}
    for name, expected in bindings.items():
        onnx.checker.check_model(str(out / name), full_check=True)
        graph = onnx.load(str(out / name), load_external_data=False).graph
        for values, bound in ((graph.input, expected.inputs), (graph.output, expected.outputs)):
            found = [(value.name, shape_of(value), TYPES[value.type.tensor_type.elem_type]) for value in values]
            assert found == [(binding.name, binding.shape, binding.dtype) for binding in bound]


def test_table_of_bindings_is_true(checkpoint: Checkpoints) -> None:
    """The package's docstring against the bindings, number by number."""
    spec = read_spec(checkpoint("llama-mha"))
    text, side = spec.text, spec.vision.image_size
    sizes = {
        "S": side,
        "J": spec.tokens_per_image,
        "hidden": text.hidden_size,
        "L": text.layers,
        "H_kv": text.kv_heads,
        "d": text.head_dim,
        "V": text.vocab_size,
    }
    rows = re.findall(
        r"^\| (in|out) \| (\S+) \| (.+?) \| (\w+) \|$", avl_edge.package.export.__doc__ or "", re.MULTILINE
    )
    table: dict[str, set[Any]] = {"in": set(), "out": set()}
    for direction, name, shape, dtype in rows:
        layers = range(text.layers) if name.endswith(".N") else [None]
        for layer in layers:
            # M' is T up to the layer that prunes, which here is 2, and M beyond it.
            tokens = "T" if layer is None or layer <= 2 else "M"
            dims = [tokens if dim == "M'" else dim for dim in shape.split(", ")]
            resolved = tuple(int(dim) if dim.isdigit() else sizes.get(dim, dim) for dim in dims)
            full_name = name if layer is None else name.replace("N", str(layer))
            table[direction].add((full_name, resolved, "float16" if dtype == "model" else dtype))
    both = (vision_bindings(spec, "float16"), decoder_bindings(spec, "float16", 2))

    def flat(bindings: Sequence[Bindings], direction: str) -> set[Any]:
        chosen = [part.inputs if direction == "in" else part.outputs for part in bindings]
        return {(binding.name, binding.shape, binding.dtype) for part in chosen for binding in part}

    assert table == {direction: flat(both, direction) for direction in ("in", "out")}


def test_rows_too_small_to_be_packed_have_no_words(model: Path, checkpoint: Checkpoints) -> None:
    """One head of 16 elements of 16 bits: an int8 record would be longer. In float32 it is not."""
    spec = read_spec(model)
    for dtype in PRECISIONS:
        shapes = {each.name: each.shape for each in decoder_bindings(spec, dtype, None).inputs}
        packs = dtype == "float32"
        assert row_formats(spec.text, dtype) == (("exact", "int8", "int4", "int8/int4") if packs else ("exact",))
        assert (set(WORDS) <= shapes.keys()) == packs
        assert shapes["slots"][1] == ("P * T" if packs else "T")
        assert shapes["row_offsets"][1] == ("P * B + 1" if packs else "B + 1")
    assert row_formats(read_spec(checkpoint("llama-mha")).text, "float16") == ("exact", "int8", "int4", "int8/int4")


def test_packed_layers_are_written_as_their_numbers(checkpoint: Checkpoints, tmp_path: Path) -> None:
    section = {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}
    codes_of = partial(round_to_nearest, bits=4, group=32, symmetric=False)
    quantised, plain = quantized_copy(checkpoint("llama-bias"), tmp_path, codes_of, partial(gptq, version=2), section)
    for directory in (quantised, plain):
        export(directory, tmp_path / f"{directory.name}-graphs", Settings("float32"))
    for name in (DECODER, f"{DECODER}.data"):
        own, expected = (tmp_path / f"{part}-graphs" / name for part in ("quantised", "plain"))
        assert own.read_bytes() == expected.read_bytes()


def test_export_is_repeatable(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(model, tmp_path / name, Settings("float32", 1))
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted([VISION, f"{VISION}.data", DECODER, f"{DECODER}.data", PLUGIN_DECODER])
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_plugin_graph_differs_by_the_body_alone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(model, out, Settings("float32", 1))
    with_body, without = (onnx.load(str(out / name), load_external_data=False) for name in (DECODER, PLUGIN_DECODER))
    assert [function.name for function in with_body.functions] == ["CoreAttention"]
    assert not without.functions
    plugins = [node for node in without.graph.node if node.domain == "avl"]
    assert [node.op_type for node in plugins] == ["CoreAttention"] * read_spec(model).text.layers
    for layer, node in enumerate(plugins):
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes == {"layer": layer, "plugin_namespace": b"avl", "plugin_version": b"1"}
        for name in ("plugin_namespace", "plugin_version"):
            node.attribute.remove(next(attribute for attribute in node.attribute if attribute.name == name))
    with_body.ClearField("functions")
    assert with_body == without


def test_plan_counts_what_the_files_hold(model: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", Settings("float16", 1)
    plan = plan_export(export(model, out, settings), settings)
    sizes = {}
    for name in plan.weights:
        weights = onnx.load(str(out / name), load_external_data=False).graph.initializer
        sizes[name] = [
            int(entry.value) for tensor in weights for entry in tensor.external_data if entry.key == "length"
        ]
    assert plan.weights == {name: sum(each) for name, each in sizes.items()}
    every = [size for each in sizes.values() for size in each]
    assert (plan.tensors, plan.largest, plan.bytes) == (len(every), max(every), sum(every))


def test_plan_digest_tells_graphs_apart(checkpoint: Checkpoints) -> None:
    specs = [read_spec(checkpoint(name)) for name in ("llama-bias", "llama-mha", "llama-gqa-full")]
    variants = [
        (spec, Settings(precision, layer)) for spec in specs for precision in PRECISIONS for layer in (None, 0, 1)
    ]
    digests = {plan_export(*variant).digest for variant in variants}
    assert len(digests) == len(variants)
    assert digests == {plan_export(*variant).digest for variant in variants}


def test_progress_counts_every_tensor(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export_model(read_spec(model), model, tmp_path, Settings("float32"), lambda *step: seen.append(step))
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]


def test_tied_embedding_is_stored_once(checkpoint: Checkpoints, tmp_path: Path) -> None:
    directory = checkpoint("llama-tied")
    spec = export(directory, tmp_path / "out", Settings("float32"))
    weights = onnx.load(str(tmp_path / "out" / DECODER), load_external_data=False).graph.initializer
    tables = [tensor.name for tensor in weights if spec.text.vocab_size in tensor.dims]
    assert tables == ["text.embed_tokens.weight"]


class TestErrors:
    def test_pruning_needs_a_layer_with_one_behind_it(self, model: Path, tmp_path: Path) -> None:
        for layer in (-1, SPECS["llama-bias"].layers - 1):
            with pytest.raises(BadInput, match=f"after layer {layer}"):
                export_model(read_spec(model), model, tmp_path, Settings("float32", layer))

    def test_weights_beyond_float16(self, tmp_path: Path) -> None:
        directory = make_checkpoint(tmp_path / "model", SPECS["llama-mha"])
        path = directory / "model.safetensors"
        tensors = dict(_tensors(path))
        name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
        tensors[name][0, 0] = 1e6
        _save(tensors, path)
        with pytest.raises(BadModel, match=r"layers\.1\.mlp\.up_proj\.weight .* float16: .* --precision"):
            export_model(read_spec(directory), directory, tmp_path, Settings("float16"))

    def test_bias_that_the_config_denies(self, tmp_path: Path) -> None:
        directory = make_checkpoint(tmp_path / "model", SPECS["llama-bias"])
        config = directory / "config.json"
        config.write_text(config.read_text().replace('"attention_bias": true', '"attention_bias": false'))
        with pytest.raises(BadModel, match="bias, which config"):
            export_model(read_spec(directory), directory, tmp_path, Settings("float32"))

    def test_without_onnx(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        with pytest.raises(BadInput, match=r"pip install 'avl-edge\[export\]'") as error:
            export_model(read_spec(model), model, tmp_path, Settings("float32"))
        assert "\n" not in str(error.value)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)
