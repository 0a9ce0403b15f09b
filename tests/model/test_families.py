"""Each family gives what transformers gives: pixels, token ids, positions, logits and greedy tokens, on random
checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from avl_edge import BadInput, BadModel, Options, Runtime
from avl_edge.model.known import shape_of_checkpoint
from avl_edge.request import Prompt
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.family_checkpoints import SPECS, Inputs, reference_inputs
from tests.equipment.recorder import Recorder

TOKENS, PROMPT = 64, "What is shown in this picture?"
IMAGES = [random_image(n, size) for n, size in enumerate(((90, 62), (61, 201), (57, 56), (33, 300)))]


def _rolled(count: int, name: str) -> list[Image.Image]:
    """So many of the pictures, beginning with another one for each checkpoint."""
    start = sorted(SPECS).index(name)
    return [IMAGES[(start + n) % len(IMAGES)] for n in range(count)]


@torch.no_grad()
def _reference(directory: Path, inputs: Inputs, tokens: list[int]) -> tuple[list[int], Tensor]:
    """transformers' greedy tokens, and its logits at every step given ``tokens``: ``[len(tokens), vocabulary]``."""
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    length = len(inputs.token_ids)
    chosen = model.generate(**inputs.model, max_new_tokens=TOKENS, do_sample=False)[0, length:].tolist()
    ids = torch.tensor([inputs.token_ids + tokens])
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs.model:
        types = inputs.model["mm_token_type_ids"]
        longer["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, len(tokens))], dim=1)
    return chosen, model(**{**inputs.model, **longer}).logits[0, length - 1 : -1]


def _check_positions(directory: Path, inputs: Inputs, prompt: Prompt) -> None:
    """By transformers, where the model has positions of its own."""
    model = AutoModelForImageTextToText.from_pretrained(directory).model
    if not hasattr(model, "get_rope_index"):
        assert prompt.rope is None
        return
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    expected, delta = model.get_rope_index(*(inputs.model[name] for name in names))
    assert prompt.rope is not None
    assert np.array_equal(prompt.rope.coordinates, expected[:, 0])
    assert prompt.rope.next == len(prompt) + int(delta)


@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("name", SPECS)
def test_all_is_what_transformers_makes_of_it(family: Checkpoints, name: str, images: int) -> None:
    directory, pictures = family(name), _rolled(images, name)
    runtime = Runtime.load(directory, threaded=False)
    record = Recorder(runtime)
    request = runtime.prepare(pictures, PROMPT, Options(method="full", max_new_tokens=TOKENS))
    generation = runtime.submit(request)
    tokens = list(generation.result().token_ids)

    inputs = reference_inputs(directory, SPECS[name], pictures, PROMPT)
    assert list(generation.prompt.token_ids) == inputs.token_ids
    assert request.prompt.pixel_values is not None
    for ours, theirs in zip(request.prompt.pixel_values.pictures, inputs.pixels, strict=True):
        assert np.array_equal(ours.values.reshape(theirs.shape), theirs)
    _check_positions(directory, inputs, generation.prompt)
    chosen, logits = _reference(directory, inputs, tokens)
    assert tokens == chosen
    assert (torch.stack(record.logits) - logits).abs().max() <= 2e-4
    assert len(set(tokens)) > 8


@pytest.mark.parametrize("limits", [(None, 6 * 28**2), (30 * 28**2, None), (5 * 28**2, 9 * 28**2)])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_request_may_ask_for_a_range_of_pixels(family: Checkpoints, name: str, limits: tuple[int, int]) -> None:
    directory = family(name)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(directory)
    size = {"shortest_edge": limits[0] or 4 * 28**2, "longest_edge": limits[1] or 20 * 28**2}
    size["longest_edge"] = max(size.values())
    runtime = Runtime.open(directory)
    options = Options(min_pixels=limits[0], max_pixels=size["longest_edge"])
    prompt = runtime.prepare(IMAGES, PROMPT, options).prompt
    given = theirs(images=IMAGES, size=size, return_tensors="np")
    assert prompt.pixel_values is not None
    ours = np.concatenate([each.values for each in prompt.pixel_values.pictures])
    assert np.array_equal(ours, given["pixel_values"])
    assert [span.length for span in prompt.spans] == (given["image_grid_thw"].prod(1) // 4).tolist()
    with runtime.open_images(IMAGES, options) as session:
        assert session.prepare(PROMPT).prompt.token_ids == prompt.token_ids
        with pytest.raises(BadInput, match="keep their size"):
            session.prepare(PROMPT, Options(max_pixels=28**2 * 7))


def test_pixels_that_no_picture_can_have_are_refused(family: Checkpoints) -> None:
    with pytest.raises(BadInput, match=r"cannot have 3136 pixels at least and 99 at most"):
        Runtime.open(family("qwen2_vl")).prepare(IMAGES, PROMPT, Options(max_pixels=99))
    for name in ("internvl-qwen2", "llava_next-vicuna"):
        with pytest.raises(BadInput, match="sizes of its own: leave min_pixels and max_pixels out"):
            Runtime.open(family(name)).prepare(IMAGES, PROMPT, Options(max_pixels=99))
    for pixels in (0, -1, 2.5, "many"):
        with pytest.raises(BadInput, match="max_pixels must be"):
            Options(max_pixels=pixels)  # type: ignore[arg-type]


def _old_name(name: str) -> str:
    """As files on the hub have it."""
    for new, old in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


@pytest.mark.parametrize("name", ["qwen2_vl-tied", "qwen2_5_vl"])
def test_files_as_they_are_on_the_hub(family: Checkpoints, tmp_path: Path, name: str) -> None:
    """The decoder's sizes beside the vision encoder's, tensors by older names, pixels without a section of theirs."""
    directory = family(name)
    expected = _tokens(directory)
    for path in (*directory.glob("*token*"), directory / "generation_config.json"):
        shutil.copy(path, tmp_path)
    save_file(
        {_old_name(name): tensor for name, tensor in load_file(directory / "model.safetensors").items()},
        tmp_path / "model.safetensors",
    )
    config = json.loads((directory / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    config |= {key: value for key, value in text.items() if key != "model_type"}
    config |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    size = settings.pop("size")
    settings |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    settings["image_processor_type"] = "Qwen2VLImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert not any(name.startswith("model.language_model") for name in load_file(tmp_path / "model.safetensors"))
    assert _tokens(tmp_path) == expected


def _tokens(directory: Path) -> tuple[int, ...]:
    options = Options(method="full", max_new_tokens=16)
    return Runtime.load(directory, threaded=False).generate(IMAGES[:1], PROMPT, options).result().token_ids


def _patches(directory: Path, name: str) -> Callable[[int, int], int]:
    """The tokens of a picture of some height and width, by transformers."""
    if name == "internvl-qwen2":
        processor = GotOcr2ImageProcessorPil.from_pretrained(directory)
        return lambda height, width: 4 * processor.get_number_of_image_patches(height, width)
    qwen = Qwen2VLImageProcessorPil.from_pretrained(directory)
    return lambda height, width: qwen.get_number_of_image_patches(height, width) // 4


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl-qwen2"])
def test_image_tokens_of_any_size_are_counted_from_small_files(family: Checkpoints, tmp_path: Path, name: str) -> None:
    """Those of LLaVA-1.6 are in `test_shapes`."""
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copy(family(name) / file, tmp_path)
    rule, expected = shape_of_checkpoint(tmp_path, name).picture, _patches(tmp_path, name)
    for width, height in np.random.default_rng(0).integers(20, 3000, (200, 2)).tolist():
        assert rule(width, height).tokens == expected(height, width)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llava_next-vicuna", {"vision_feature_select_strategy": "full"}, "strategy 'full' is not supported"),
        ("llava_next-vicuna", {"image_grid_pinpoints": [[56, 57]]}, r"whole tiles of 56 pixels, not \[56, 57\]"),
        ("llava_next-vicuna", {"image_grid_pinpoints": [[56 * 9, 56 * 8]]}, "image_grid_pinpoints must be"),
        ("llava_next-vicuna", {"image_grid_pinpoints": "all"}, "image_grid_pinpoints must be"),
        ("llava_next-vicuna", {"image_grid_pinpoints": [[56, True]]}, "image_grid_pinpoints must be"),
        ("qwen2_vl", {"vision_config": {"in_channels": 4}}, "in_channels 4 is not supported: it must be 3"),
        ("qwen2_vl", {"vision_config": {"temporal_patch_size": 1}}, "temporal_patch_size 1 is not supported"),
        ("qwen2_vl", {"vision_config": {"num_heads": 3}}, "is not a multiple of 4 "),
        ("qwen2_5_vl", {"vision_config": {"window_size": 5}}, "window_size 5 is smaller than a token"),
        ("qwen2_5_vl", {"vision_config": {"fullatt_block_indexes": "all"}}, "must be a list of layers, not 'all'"),
        ("qwen3_vl", {"vision_config": {"deepstack_visual_indexes": [2, 1]}}, "ascending and fewer"),
        ("qwen3_vl", {"vision_config": {"num_position_embeddings": 35}}, "35 is no square"),
        ("internvl-qwen2", {"vision_feature_select_strategy": "full"}, "strategy 'full' is not supported"),
        ("internvl-qwen2", {"vision_feature_layer": [1, 2]}, r"vision_feature_layer \[1, 2\] is no layer"),
        ("internvl-qwen2", {"downsample_ratio": 0.3}, "downsample_ratio 0.3 does not divide 4 patches"),
        ("internvl-qwen2", {"vision_config": {"image_size": [56, 28]}}, "image_size must be that of a square"),
        ("internvl-qwen2", {"vision_config": {"norm_type": "batch"}}, "norm_type 'batch' is not supported"),
        ("internvl-qwen2", {"text_config": {"model_type": "gpt_oss"}}, "model_type 'gpt_oss' is not supported"),
        ("qwen3_vl", {"text_config": {"rope_parameters": {"mrope_section": [1, 2]}}}, "3 numbers with the sum 8"),
    ],
)
def test_an_option_that_is_not_served_is_refused_in_a_line(
    family: Checkpoints, tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    shutil.copytree(family(name), tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with pytest.raises(BadModel, match=reason) as caught:
        Runtime.open(tmp_path / "copy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("internvl-qwen2", {"size": {"height": 28, "width": 28}}, "size must be that of the vision tower, 56 x 56"),
        ("internvl-qwen2", {"max_patches": 0}, "min_patches and max_patches must be numbers of tiles"),
        ("qwen2_vl", {"patch_size": 16}, "patch_size is 16, but the model's is 14"),
        ("qwen2_vl", {"do_resize": False}, "do_resize must be true"),
        (
            "qwen2_vl",
            {"size": {"shortest_edge": 9, "longest_edge": 3}},
            "min_pixels and max_pixels must be numbers of pixels",
        ),
        ("qwen2_vl", {"min_pixels": "few"}, "min_pixels and max_pixels must be numbers of pixels"),
        ("qwen2_vl", {"image_processor_type": "CLIPImageProcessor"}, "is not supported, only Qwen2VLImageProcessor"),
    ],
)
def test_settings_of_pictures_that_do_not_fit_are_refused(
    family: Checkpoints, tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    shutil.copytree(family(name), tmp_path / "copy")
    path = tmp_path / "copy" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BadModel, match=reason):
        Runtime.open(tmp_path / "copy")


def test_tiles_of_another_size_than_the_towers_are_refused(family: Checkpoints, tmp_path: Path) -> None:
    shutil.copytree(family("llava_next-vicuna"), tmp_path / "copy")
    path = tmp_path / "copy" / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["crop_size"] = {"height": 28, "width": 28}
    path.write_text(json.dumps(settings))
    with pytest.raises(BadModel, match="must be those of the vision tower, 56 x 56 pixels"):
        Runtime.open(tmp_path / "copy")


@pytest.mark.parametrize("name", ["llava_next-mistral", "qwen2_5_vl", "qwen3_vl", "internvl-qwen2"])
def test_features_and_pixels_weigh_what_was_planned(family: Checkpoints, name: str) -> None:
    """DeepStack's are features too."""
    runtime = Runtime.load(family(name), threaded=False)
    request = runtime.prepare(IMAGES[:2], PROMPT, Options(max_new_tokens=1))
    assert request.prompt.pixel_values is not None
    for each in request.prompt.pixel_values.pictures:
        assert each.nbytes == runtime.spec.pixel_bytes(each.picture)
    runtime.submit(request).result()
    tokens, text = sum(span.length for span in request.prompt.spans), runtime.spec.text
    each = runtime.planner.most_features // text.context
    assert runtime.memory().entries["features"].used == tokens * each
