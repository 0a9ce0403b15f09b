"""Every method on every family: A-VL, `distinct`, AttentionPack against their oracles, shared rows against own ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from avl_edge import Formats, Options, Runtime
from avl_edge.backends.stored import StoredRows
from avl_edge.config import KvShape, PromptShape
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.cache import SequenceCache
from avl_edge.kv.methods import Full
from avl_edge.kv.pool import RowPool
from avl_edge.kv.smoothing import Smoothing
from avl_edge.kv.store import RowStore
from avl_edge.request import ImageSpan, RopePositions
from tests.conftest import Checkpoints
from tests.equipment import oracle, oracle_attentionpack
from tests.equipment.checkpoints import random_image
from tests.equipment.family_checkpoints import SPECS, reference_inputs
from tests.equipment.held_rows import held_rows
from tests.equipment.oracle_attentionpack import PackSettings
from tests.equipment.recorder import Recorder

STEPS, PROMPT = 48, "What is shown in the picture, and how many boats are there?"
IMAGES = [random_image(1, (70, 90)), random_image(2, (200, 64))]
ONE_OF_EACH = ["llava_next-mistral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl-qwen2"]

AVL = {
    "published": ({}, 1),
    "pruned early, two pictures": ({"prune_layer": 0, "prefill_keep": 60, "secondary": 50, "core": 20}, 2),
    "each picture its share": ({"prune_layer": 0, "prefill_keep": 60, "secondary": 40, "core": 20, "per_span": 1}, 2),
    "by values": ({"prune_layer": 1, "prefill_keep": 70, "secondary": 30, "core": 10, "by_values": 1}, 2),
}


@pytest.mark.parametrize("settings", AVL)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_avl_equals_the_oracle(family: Checkpoints, name: str, settings: str) -> None:
    """DeepStack's features go along with what is pruned, and keys keep the positions that they had."""
    parameters, images = AVL[settings]
    _assert_equal(family, name, images, Options("avl", parameters), oracle.AvlSettings(**parameters))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_distinct_values_equal_the_oracle(family: Checkpoints, name: str) -> None:
    settings = oracle.AvlSettings(100, 30, 30, refresh=0, text_keep=100, by_values=1)
    _assert_equal(family, name, 2, Options("distinct", {"secondary": 30}), settings)


def _assert_equal(family: Checkpoints, name: str, images: int, options: Options, settings: oracle.AvlSettings) -> None:
    directory = family(name, dtype=torch.float64)
    generation = Runtime.load(directory, threaded=False).generate(
        IMAGES[:images], PROMPT, replace(options, max_new_tokens=STEPS)
    )
    given = _given(directory, name, images)
    expected = oracle.generate(_model(directory), given["input_ids"], given, settings, STEPS)
    for step, truth in enumerate(expected):
        event = next(generation)
        assert event.token_id == truth.token, f"step {step}"
        if event.finish_reason is None:
            assert held_rows(generation.cache) == truth.rows, f"step {step}"


def _model(directory: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager").double().eval()


def _given(directory: Path, name: str, images: int) -> dict[str, torch.Tensor]:
    """What transformers' model takes, in float64."""
    inputs = reference_inputs(directory, SPECS[name], IMAGES[:images], PROMPT).model
    return {**inputs, "pixel_values": inputs["pixel_values"].double()}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_attentionpack_equals_its_oracle(family: Checkpoints, name: str) -> None:
    """Keys are kept before RoPE, and turn by the positions of their own tokens when they are rebuilt."""
    directory = family(name, dtype=torch.float64)
    runtime = Runtime.load(directory, threaded=False)
    recorder = Recorder(runtime)
    options = Options("attentionpack", {}, Formats("exact", "lowrank:24", "lowrank:24@8"), max_new_tokens=24)
    generation = runtime.generate(IMAGES[:1], PROMPT, options)
    model, given = _model(directory), _given(directory, name, 1)
    expected = oracle_attentionpack.generate(model, given["input_ids"], given, PackSettings(24, 8), 24)
    for step, event in zip(expected, generation, strict=True):
        assert event.token_id == step.token
        if event.finish_reason is None:
            held = generation.cache.rows.layers  # type: ignore[union-attr]
            assert [tuple(rows.image_positions[rows.core].tolist()) for rows in held] == step.core
    for own, step in zip(recorder.logits, expected, strict=True):
        torch.testing.assert_close(own, step.logits, rtol=0, atol=2e-4 * float(step.logits.abs().max()))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_questions_over_shared_rows_are_answered_as_alone(family: Checkpoints, name: str) -> None:
    directory = family(name)
    runtime = Runtime.load(directory, threaded=False)
    options = Options("full", max_new_tokens=24)
    questions = (PROMPT, "Why?")
    with runtime.open_images(IMAGES, options) as session:
        shared = [session.ask(each).result().token_ids for each in questions]
    assert shared == [runtime.generate(IMAGES, each, options).result().token_ids for each in questions]


@pytest.mark.parametrize("method", ["avl", "h2o", "fastv", "distinct", "coarse"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_method_answers_within_its_budget(family: Checkpoints, name: str, method: str) -> None:
    options = Options(method, max_new_tokens=12, kv_budget="150kB")
    result = Runtime.load(family(name), threaded=False).generate(IMAGES, PROMPT, options).result()
    assert len(result.token_ids) == 12
    assert result.kv.bytes_peak <= 150_000


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_packed_rows_say_about_what_exact_ones_do(family: Checkpoints, name: str) -> None:
    logits = []
    for formats in (None, Formats("int8", "int8", "int8")):
        runtime = Runtime.load(family(name), threaded=False)
        recorder = Recorder(runtime)
        runtime.generate(IMAGES, PROMPT, Options("full", formats=formats, max_new_tokens=2)).result()
        logits.append(recorder.logits[1])
    assert (logits[0] - logits[1]).std() < 0.02 * logits[0].std()


def test_positions_are_looked_up_by_a_tokens_place() -> None:
    """In the prompt as it says, behind it on from where it ends, on all axes alike."""
    shape, spans = KvShape(2, 1, 8, 4), [ImageSpan("", 1, 4)]
    rope = RopePositions(np.array([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]], dtype=np.int32), 4)
    plan = kv_plan(Full(), Formats(), shape, PromptShape(1, 4, 1), 5)
    cache = SequenceCache(RowPool(plan.pages, shape), plan, 6, spans, 2, rope=rope)
    places = np.array([4, 0, 5, 6, 9], dtype=np.int32)
    assert cache.coordinates(places).tolist() == [[1, 0, 3, 4, 7], [2, 0, 3, 4, 7], [2, 0, 3, 4, 7]]
    assert cache.begin_step()[0] == 4
    assert cache.reach == plan.tokens - 2


def test_keys_are_smoothed_by_their_positions() -> None:
    """Not by the places of their tokens, between which a picture's rows and columns stand still."""
    seen: list[tuple[torch.Tensor, int]] = []

    def fit(keys: torch.Tensor, positions: torch.Tensor, reach: int, angles: Any) -> Smoothing:  # noqa: ARG001
        seen.append((positions, reach))
        return Smoothing(torch.zeros_like(keys[0]), torch.ones_like(keys[0]))

    shape, spans, formats = KvShape(1, 1, 32, 4), [ImageSpan("", 1, 2)], Formats("int8", "int8", "int8")
    rope = RopePositions(np.array([[0, 1, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2]], dtype=np.int32), 3)
    plan = kv_plan(Full(), formats, shape, PromptShape(1, 2, 1), 5)
    rows = StoredRows(RowStore(plan.pages, shape, torch.float32), lambda _: pytest.fail("nothing is rotated"), fit)
    cache = SequenceCache(rows.new_pool(), plan, 4, spans, 1, rope=rope)
    keys, scores = torch.randn(4, 1, 32), np.zeros(4)
    rows.store_prompt(cache, 0, cache.store_prompt(0, scores, scores), keys, keys)
    assert seen[0][0].tolist() == rope.coordinates.tolist()
    assert seen[0][1] == cache.reach == plan.tokens - 1
