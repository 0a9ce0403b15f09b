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
from torch import Tensor
from transformers import AutoModelForImageTextToText

from avl_edge import BadModel, Options, Runtime
from tests.equipment.checkpoints import random_image
from tests.equipment.family_checkpoints import SPECS, Inputs, make_family, reference_inputs
from tests.equipment.recorder import Recorder

TOKENS, PROMPT = 64, "What is shown in this picture?"
IMAGES = [random_image(n, size) for n, size in enumerate(((90, 62), (61, 201), (57, 56), (33, 300)))]
Families = Callable[[str], Path]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Families:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_family(tmp_path_factory.mktemp(name), SPECS[name])
        return made[name]

    return make


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


@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("name", SPECS)
def test_all_is_what_transformers_makes_of_it(family: Families, name: str, images: int) -> None:
    directory, pictures = family(name), _rolled(images, name)
    runtime = Runtime.load(directory, threaded=False)
    record = Recorder(runtime)
    generation = runtime.generate(pictures, PROMPT, Options(method="full", max_new_tokens=TOKENS))
    tokens = list(generation.result().token_ids)

    inputs = reference_inputs(directory, SPECS[name], pictures, PROMPT)
    assert list(generation.prompt.token_ids) == inputs.token_ids
    assert generation.prompt.pixel_values is not None
    for ours, theirs in zip(generation.prompt.pixel_values, inputs.pixels, strict=True):
        assert np.array_equal(ours.values.reshape(theirs.shape), theirs)
    chosen, logits = _reference(directory, inputs, tokens)
    assert tokens == chosen
    assert (torch.stack(record.logits) - logits).abs().max() <= 2e-4
    assert len(set(tokens)) > 8


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llava_next-vicuna", {"vision_feature_select_strategy": "full"}, "strategy 'full' is not supported"),
        ("llava_next-vicuna", {"image_grid_pinpoints": [[56, 57]]}, r"whole tiles of 56 pixels, not \[56, 57\]"),
        ("llava_next-vicuna", {"image_grid_pinpoints": [[56 * 9, 56 * 8]]}, "image_grid_pinpoints must be"),
        ("llava_next-vicuna", {"image_grid_pinpoints": "all"}, "image_grid_pinpoints must be"),
        ("llava_next-vicuna", {"image_grid_pinpoints": [[56, True]]}, "image_grid_pinpoints must be"),
    ],
)
def test_an_option_that_is_not_served_is_refused_in_a_line(
    family: Families, tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    shutil.copytree(family(name), tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BadModel, match=reason) as caught:
        Runtime.open(tmp_path / "copy")
    assert "\n" not in str(caught.value)


def test_tiles_of_another_size_than_the_towers_are_refused(family: Families, tmp_path: Path) -> None:
    shutil.copytree(family("llava_next-vicuna"), tmp_path / "copy")
    path = tmp_path / "copy" / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["crop_size"] = {"height": 28, "width": 28}
    path.write_text(json.dumps(settings))
    with pytest.raises(BadModel, match="must be those of the vision tower, 56 x 56 pixels"):
        Runtime.open(tmp_path / "copy")
