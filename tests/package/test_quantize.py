"""`avl-edge quantize`: what it writes is what transformers and the runtime read, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from avl_edge import BadInput, BadModel, Options, Runtime
from avl_edge.errors import Busy
from avl_edge.model.checkpoint import Weights, load_weights
from avl_edge.model.checkpoint_files import map_tensors
from avl_edge.model.families import read_spec
from avl_edge.model.prompt import Processor
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.model.weight_format import WeightFormat, WeightFormats
from avl_edge.model.weights import Grouped, pack
from avl_edge.package.quantize import calibration_prompts, quantize_checkpoint
from avl_edge.package.quantize.calibration import Calibration
from avl_edge.package.quantize.scaling import Scaling, layer_sites
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.pixels import stacked

INT4 = WeightFormats.of("int4:32", None)
WITH_HEAD = WeightFormats.of("int4:32", "int8")


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(2):
        random_image(number, (70, 90)).save(folder / f"{number}.png")
    return folder


def _tokens(directory: Path, **packed: str) -> list[int]:
    runtime = Runtime.load(directory, threaded=False, **packed)  # type: ignore[arg-type]
    asked = runtime.generate([random_image(1, (70, 90))], "What is shown?", Options(method="full", max_new_tokens=24))
    return list(asked.result().token_ids)


@pytest.mark.parametrize(
    "formats", [WeightFormats.of("int8", None), INT4, WITH_HEAD, WeightFormats.of(None, "int4:32")]
)
@pytest.mark.parametrize("source", ["qwen2-gqa", "mistral-gqa"])
def test_the_runtime_packs_alike_as_it_loads(
    checkpoint: Checkpoints, tmp_path: Path, source: str, formats: WeightFormats
) -> None:
    directory = checkpoint(source)
    made = quantize_checkpoint(directory, tmp_path / "out", formats)
    assert _tokens(made.directory) == _tokens(directory, **formats.named())
    assert made.bytes < made.source_bytes
    assert {path.suffix for path in made.directory.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}


@pytest.mark.parametrize("formats", [WeightFormats.of("int8", "int8"), WITH_HEAD])
@pytest.mark.parametrize("source", ["qwen2-gqa", "mistral-gqa"])
def test_transformers_reads_it_and_says_the_same(
    checkpoint: Checkpoints, tmp_path: Path, source: str, formats: WeightFormats
) -> None:
    pytest.importorskip("compressed_tensors", reason="transformers reads the format by this package")
    made = quantize_checkpoint(checkpoint(source), tmp_path / "out", formats)
    request = Runtime.open(made.directory).prepare(
        [random_image(1, (70, 90))], "What is shown?", Options(method="full", max_new_tokens=24)
    )
    ids, pixels = torch.tensor([request.prompt.token_ids]), torch.from_numpy(stacked(request.prompt))
    model = AutoModelForImageTextToText.from_pretrained(made.directory).eval()
    with torch.no_grad():
        expected = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=24, do_sample=False)
    assert _tokens(made.directory) == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_vl-tied", "internvl-qwen3", "llava_next-mistral"])
def test_other_families(family: Checkpoints, tmp_path: Path, name: str) -> None:
    directory = family(name)
    prompts = calibration_prompts(_pictures(tmp_path / "pictures"), Processor.of(read_spec(directory), directory))
    made = quantize_checkpoint(directory, tmp_path / "out", INT4, prompts)
    spec = read_spec(made.directory)
    plain, packed = (
        VisionLanguageModel(spec, load_weights(each, prefixes=spec.prefixes)) for each in (directory, made.directory)
    )
    assert all(isinstance(each, Grouped) for layer in packed.decoder.layers for each in layer.linears)
    assert torch.equal(plain.decoder.embedding, packed.decoder.embedding)
    assert len(_tokens(made.directory)) > 0


def test_scaling_changes_no_output_and_lowers_the_error(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Weights scaled as AWQ does compute what they did; rounded, they are nearer to it than those that are not."""
    directory = checkpoint("qwen2-gqa")
    spec = read_spec(directory)
    tensors = {name: each.tensor.clone() for name, each in map_tensors(directory, spec.prefixes).items()}
    # A few inputs that are far larger than the rest, which is what the method is for.
    tensors["text.layers.0.input_layernorm.weight"][:3] *= 40
    prompts = calibration_prompts(_pictures(tmp_path / "pictures"), Processor.of(spec, directory))
    calibration, form = Calibration(spec, Weights(tensors), prompts), WeightFormat.of("int4:32")
    recorder = calibration.layer("text.layers.0")
    site = layer_sites("text.layers.0", spec.text)[0]
    scaling = Scaling.of([site], recorder, tensors, form)
    x = torch.cat(recorder.inputs[site.readers[0]].sampled)
    giver = f"{site.giver}.weight"
    change = scaling.apply(giver, tensors[giver]) / tensors[giver]
    for reader in site.readers:
        weight = tensors[f"{reader}.weight"]
        scaled = scaling.apply(f"{reader}.weight", weight)
        exact = x @ weight.T
        assert torch.allclose((x * change) @ scaled.T, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    error = {
        aware: sum(
            float(
                (
                    (x * (change if aware else 1)) @ pack(_of(scaling, tensors, each, aware), form).dequantize().T
                    - x @ tensors[f"{each}.weight"].T
                )
                .square()
                .sum()
            )
            for each in site.readers
        )
        for aware in (False, True)
    }
    assert error[True] < 0.7 * error[False]


def _of(scaling: Scaling, tensors: dict[str, torch.Tensor], layer: str, aware: bool) -> torch.Tensor:
    name = f"{layer}.weight"
    return scaling.apply(name, tensors[name]) if aware else tensors[name]


def test_an_interrupted_run_goes_on(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Nothing is seen before all is there; what was complete is not written again; the result is that of one run."""
    directory, out = checkpoint("qwen2-gqa"), tmp_path / "out"

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(directory, out, WITH_HEAD, progress=interrupt)
    assert not out.exists()
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.staging").glob("*.safetensors")}
    assert len(left) == 2
    quantize_checkpoint(directory, out, WITH_HEAD)
    assert {name: (out / name).stat().st_mtime_ns for name in left} == left
    whole = quantize_checkpoint(directory, tmp_path / "whole", WITH_HEAD).directory
    for path in whole.glob("*.safetensors"):
        ours, theirs = load_file(out / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for path in out.glob("*.safetensors") for name in load_file(path)} == set(index)


def test_what_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    directory, out = checkpoint("qwen2-gqa"), tmp_path / "out"
    with pytest.raises(BadInput, match="nothing to quantise: give --weights"):
        quantize_checkpoint(directory, out, WeightFormats())
    with pytest.raises(BadInput, match=r"groups of 128 do not divide a matrix of \d+ inputs: pack as int"):
        quantize_checkpoint(directory, out, WeightFormats.of("int4", None))
    with pytest.raises(BadInput, match="int8, int4 or int4:GROUP"):
        WeightFormats.of("int3", None)
    made = quantize_checkpoint(directory, out, INT4).directory
    with pytest.raises(BadInput, match="is there already"):
        quantize_checkpoint(directory, out, INT4)
    with pytest.raises(BadInput, match="is quantised already"):
        quantize_checkpoint(made, tmp_path / "twice", INT4)
    with pytest.raises(BadInput, match="is quantised already"):
        Runtime.load(made, weights="int8")
    (made / "config.json").write_text(
        json.dumps(
            {
                key: value
                for key, value in json.loads((made / "config.json").read_text()).items()
                if key != "quantization_config"
            }
        )
    )
    with pytest.raises(BadModel, match="belongs to a quantised layer"):
        Runtime.load(made)


def test_two_at_once(checkpoint: Checkpoints, tmp_path: Path) -> None:
    directory, out = checkpoint("qwen2-gqa"), tmp_path / "out"

    def another(*_: int) -> None:
        with pytest.raises(Busy, match="another process is writing"):
            quantize_checkpoint(directory, out, INT4)

    quantize_checkpoint(directory, out, INT4, progress=another)


def test_the_plan_knows_what_is_stored(checkpoint: Checkpoints, tmp_path: Path) -> None:
    directory = checkpoint("qwen2-gqa")
    made = quantize_checkpoint(directory, tmp_path / "out", WITH_HEAD).directory
    plain, packed = (Runtime.open(each).planner for each in (directory, made))
    assert (packed.model.stored.body, packed.model.stored.head) == ("int4:32", "int8")
    assert Runtime.open(directory, weights="int4:32", head="int8").planner.model.stored == packed.model.stored
    weight, held = packed.model.weight_bytes(packed.model.stored), np.array([0, 0])
    for which, planner in enumerate((plain, packed)):
        held[which] = planner.target.weight_bytes(planner.model)
    assert weight <= held[1] < held[0]
