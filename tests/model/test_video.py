"""Frames of a video: pixels, token ids, positions and answers as transformers' models take and give them.

transformers' video processors need torchvision, so frames are resized one by one by its picture processors, and laid
out by the rules of its video processors: two frames are a patch, the last one of an odd number stands twice.
"""

from __future__ import annotations

import ast
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from avl_edge import BadInput, Frames, Message, Options, Runtime
from avl_edge.model.families import read_spec
from avl_edge.model.images import Moment
from avl_edge.model.prompt.codec import open_codec
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.recorder import Recorder

SIZE, PROMPT = (90, 62), "What happens?"
STILL = random_image(9, (61, 70))


def _frames(count: int) -> list[Image.Image]:
    return [random_image(20 + n, SIZE) for n in range(count)]


def _video(directory: Path, frames: list[Image.Image], edge: int) -> tuple[np.ndarray, list[int]]:
    """The values of all patches, and (moments, rows, columns) of patches."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    frames = [*frames, frames[-1]] if len(frames) % 2 else frames
    given = processor(images=frames, return_tensors="np")
    rows, columns = given["image_grid_thw"][0, 1:].tolist()
    shown = given["pixel_values"].reshape(len(frames) // 2, 2, rows * columns, 3, 2, edge, edge)
    pairs = np.stack([shown[:, 0, :, :, 0], shown[:, 1, :, :, 1]], axis=3)
    return pairs.reshape(len(frames) // 2 * rows * columns, -1), [len(frames) // 2, rows, columns]


def _reference(directory: Path, frames: list[Image.Image], seconds: list[float]) -> tuple[list[int], dict[str, Any]]:
    """Token ids, and what transformers' model takes: a still, a video of frames at those ``seconds``, a question."""
    edge = 16 if "qwen3" in directory.name else 14
    values, grid = _video(directory, frames, edge)
    still = Qwen2VLImageProcessorPil.from_pretrained(directory)(images=[STILL], return_tensors="pt")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    each = grid[1] * grid[2] // 4
    if edge == 16:
        times = [*seconds, seconds[-1]]
        stamps = [f"<{(times[2 * n] + times[2 * n + 1]) / 2:.1f} seconds>" for n in range(grid[0])]
        video = "".join(f"{stamp}<|vision_start|>{'<|video_pad|>' * each}<|vision_end|>" for stamp in stamps)
    else:
        video = "<|video_pad|>" * each * grid[0]
    image = "<|image_pad|>" * (int(still["image_grid_thw"].prod()) // 4)
    text = (
        f"<|im_start|>user\n<|vision_start|>{image}<|vision_end|><|vision_start|>{video}<|vision_end|>{PROMPT}"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    types += 2 * (ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")).int()
    given = {"input_ids": ids, "mm_token_type_ids": types, **still}
    given |= {"pixel_values_videos": torch.from_numpy(values), "video_grid_thw": torch.tensor([grid])}
    if "qwen2_5" in directory.name:
        given["second_per_grid_ts"] = torch.tensor([2 * seconds[1]])
    return ids[0].tolist(), given


@pytest.mark.parametrize(("count", "fps"), [(4, 2.0), (5, 0.4)])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_video_is_answered_as_by_transformers(family: Checkpoints, name: str, count: int, fps: float) -> None:
    directory, frames = family(name), _frames(count)
    # Limits that Qwen3-VL's rule for whole videos and the others' for frames both leave alone.
    options = Options(method="full", max_new_tokens=16, min_pixels=1, max_pixels=10**6)
    runtime = Runtime.load(directory, threaded=False)
    record = Recorder(runtime)
    shown = [Message("user", [STILL, Frames.of(frames, fps), PROMPT])]
    request = runtime.prepare_chat(shown, options)
    generation = runtime.submit(request)
    tokens = list(generation.result().token_ids)
    ids, given = _reference(directory, frames, [n / fps for n in range(count)])
    assert list(request.prompt.token_ids) == ids
    assert request.prompt.pixel_values is not None
    values = np.concatenate([each.values for each in request.prompt.pixel_values.pictures[1:]])
    assert np.array_equal(values, given["pixel_values_videos"].numpy())

    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions, _ = model.model.get_rope_index(**{key: given[key] for key in names if key in given})
    assert request.prompt.rope is not None
    assert np.array_equal(request.prompt.rope.coordinates, positions[:, 0])
    assert request.prompt.rope.next == int(positions[0, 0, -1]) + 1  # as `generate` goes on
    with torch.no_grad():
        chosen = model.generate(**given, max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
        first = model(**given).logits[0, -1]
    assert tokens == chosen
    assert (record.logits[0] - first).abs().max() <= 2e-4


def _smart_resize(kind: str) -> Any:
    """The rule of transformers' video processor, whose module cannot be imported without torchvision."""
    path = Path(transformers.__file__).parent / "models" / kind / f"video_processing_{kind}.py"
    found = [each for each in ast.parse(path.read_text()).body if getattr(each, "name", "") == "smart_resize"]
    scope = {"math": math}
    exec(compile(ast.Module(found, []), str(path), "exec"), scope)
    return scope["smart_resize"]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_frames_are_resized_to_what_transformers_says(family: Checkpoints, tmp_path: Path, name: str) -> None:
    """The limits are those of the video processor's file: of a frame, or, for Qwen3-VL, of the whole video."""
    directory = shutil.copytree(family(name), tmp_path / name)
    size = {"shortest_edge": 30_000, "longest_edge": 400_000}
    (directory / "video_preprocessor_config.json").write_text(json.dumps({"size": size}))
    codec, resize = open_codec(read_spec(directory), directory), _smart_resize(name)
    for width, height, count in np.random.default_rng(0).integers(20, (900, 900, 21), (200, 3)).tolist():
        count = max(2, count - 18)
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        if name == "qwen3_vl":
            high, wide = resize(count, height, width, factor=32, **limits)
        else:
            high, wide = resize(height, width, factor=28, **limits)
        picture = codec.measure_moment(width, height, Moment((b"", b""), 1, (0.0, 0.5), count))
        edge = 32 if name == "qwen3_vl" else 28
        assert (picture.rows * edge, picture.columns * edge) == (high, wide)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_video_of_a_session(family: Checkpoints, name: str) -> None:
    runtime = Runtime.load(family(name), threaded=False)
    options, video = Options(method="full", max_new_tokens=8), Frames.of(_frames(3), 1)
    asked = runtime.prepare_chat([Message("user", [video, PROMPT])], options)
    with runtime.open_images([video], options) as session:
        assert session.ask(PROMPT).result().token_ids == runtime.submit(asked).result().token_ids
    assert len(asked.prompt.spans) == 2


@pytest.mark.parametrize(
    ("count", "seconds", "reason"),
    [
        (1, [0.0], "two frames or more"),
        (2, [0.0], "has as many times, not 1"),
        (2, [1.0, 0.5], "must ascend"),
        (2, [0.0, float("nan")], "seconds from the beginning"),
        (2, [-1.0, 0.5], "seconds from the beginning"),
    ],
)
def test_frames_that_are_no_video_are_refused(count: int, seconds: list[float], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        Frames(_frames(count), seconds)


def test_what_takes_no_videos_says_so(family: Checkpoints) -> None:
    video = [Message("user", [Frames.of(_frames(2), 1), PROMPT])]
    with pytest.raises(BadInput, match="takes no videos: give it pictures"):
        Runtime.open(family("llava_next-vicuna")).prepare_chat(video)
    frames = [random_image(1, (80, 60)), random_image(2, (60, 80))]
    with pytest.raises(BadInput, match="must be of one size"):
        Runtime.open(family("qwen2_vl")).prepare_chat([Message("user", [Frames.of(frames, 1), PROMPT])])
    with pytest.raises(BadInput, match="fps must be from"):
        Frames.of(_frames(2), 0)
