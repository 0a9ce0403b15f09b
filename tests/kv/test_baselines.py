"""H2O, FastV and StreamingLLM against their oracles: the same tokens, the same rows in every layer after every step."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from avl_edge import BadInput, Options, Runtime
from avl_edge.config import Formats, PromptShape
from avl_edge.kv.cache import prompt_shape
from avl_edge.kv.layout import PAGE_ROWS
from avl_edge.kv.methods import H2O, METHODS, FastV, Streaming
from avl_edge.kv.methods.arithmetic import share
from tests.conftest import Checkpoints
from tests.equipment import oracle_baselines as oracles
from tests.equipment.checkpoints import random_image
from tests.equipment.held_rows import held_rows
from tests.equipment.oracle import load_model
from tests.equipment.pixels import stacked
from tests.equipment.recorder import Recorder

STEPS = 32
PROMPT = "What is shown in the picture, and how many boats are there?"
IMAGES = [random_image(1, (70, 90)), random_image(2, (200, 64))]
METHOD_NAMES = ("h2o", "fastv", "streaming")
ORACLES = {"h2o": oracles.h2o, "fastv": oracles.fastv, "streaming": oracles.streaming}


def _random_settings(method: str, seed: int) -> dict[str, int]:
    rng = random.Random(f"{method} {seed}")
    if method == "h2o":
        return {"budget": rng.randint(5, 100), "heavy": rng.randint(0, 100), "grow": rng.randint(0, 1)}
    if method == "fastv":
        return {"layer": rng.randint(1, 3), "drop": rng.randint(1, 100)}
    return {"sinks": rng.randint(0, 8), "window": rng.randint(1, 60)}


# (method, checkpoint, pictures, settings): the published defaults where they evict, then random ones.
CASES = [
    ("h2o", "llama-mha", 1, {}),
    ("h2o", "qwen2-gqa", 2, {"budget": 20}),
    ("h2o", "llama3-rope", 1, {"budget": 1}),
    ("h2o", "llama-mha", 0, {"grow": 1}),
    ("fastv", "llama-mha", 1, {}),
    ("fastv", "qwen2-gqa", 2, {}),
    ("fastv", "mistral-wide", 1, {"layer": 3}),
    ("streaming", "llama-mha", 1, {"window": 20}),
    ("streaming", "qwen2-gqa", 2, {"window": 1}),
    ("streaming", "llama-mha", 0, {"window": 16}),
    *(
        (method, name, images, _random_settings(method, seed))
        for method in METHOD_NAMES
        for seed, (name, images) in enumerate(
            [("llama-gqa-full", 1), ("llama-bias", 2), ("mistral-gqa", 1), ("mistral-wide", 2), ("qwen2-tied", 1)]
        )
    ),
]


@pytest.mark.parametrize(("method", "name", "images", "settings"), CASES)
def test_tokens_and_rows_equal_the_oracle(
    checkpoint: Checkpoints, method: str, name: str, images: int, settings: dict[str, int]
) -> None:
    directory = checkpoint(name, dtype=torch.float64)
    options = Options(method=method, parameters=settings, max_new_tokens=STEPS)
    runtime = Runtime.load(directory, threaded=False)
    request = runtime.prepare(IMAGES[:images], PROMPT, options)
    generation, prompt = runtime.submit(request), request.prompt
    pixels = None if prompt.pixel_values is None else torch.from_numpy(stacked(prompt)).double()
    case = oracles.Case(load_model(directory), list(prompt.token_ids), pixels, STEPS)
    for step, truth in enumerate(ORACLES[method](case, **settings)):
        event = next(generation)
        assert event.token_id == truth.token, f"step {step}"
        if event.finish_reason is None:
            assert held_rows(generation.cache) == truth.rows, f"step {step}"
    shape = prompt_shape(len(prompt), prompt.spans)
    promised = METHODS[method](**settings).peak_rows(shape, STEPS - 1, runtime.kv_shape.layers)
    pages = -(-promised // PAGE_ROWS)
    assert generation.result().kv.bytes_peak == pages * PAGE_ROWS * runtime.kv_shape.row_bytes


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("h2o", {"budget": 100, "grow": 1}),
        ("h2o", {"budget": 100, "heavy": 0, "grow": 1}),
        ("fastv", {"drop": 0}),
        ("streaming", {}),
        ("streaming", {"sinks": 0, "window": 400}),
    ],
)
@pytest.mark.parametrize("name", ["llama-bf16", "mistral-gqa"])
def test_settings_that_drop_nothing_equal_full_bit_for_bit(
    checkpoint: Checkpoints, name: str, method: str, settings: dict[str, int]
) -> None:
    def logits(method: str, settings: dict[str, int]) -> torch.Tensor:
        runtime = Runtime.load(checkpoint(name), threaded=False)
        recorder = Recorder(runtime)
        options = Options(method=method, parameters=settings, max_new_tokens=STEPS)
        runtime.generate(IMAGES, PROMPT, options).result()
        return torch.stack(recorder.logits)

    assert torch.equal(logits(method, settings), logits("full", {}))


def test_methods_in_one_batch_answer_as_they_do_alone(checkpoint: Checkpoints) -> None:
    """Some of them want scores at a step and others do not; each gets its own, or none."""
    runtime = Runtime.load(checkpoint("mistral-gqa"), threaded=False)
    low_rank = {"attentionpack": Formats("exact", "lowrank:16", "lowrank:16@4")}
    options = [Options(method, formats=low_rank.get(method), max_new_tokens=STEPS) for method in METHODS]
    options += [Options(method="streaming", parameters={"window": 30}, max_new_tokens=STEPS)]
    alone = [runtime.generate(IMAGES, PROMPT, each).result().token_ids for each in options]
    together = [runtime.generate(IMAGES, PROMPT, each) for each in options]
    assert [generation.result().token_ids for generation in together] == alone
    assert runtime.kv_bytes_in_use == 0


# FastV's first layers hold every row, and these models have but four; H2O's fixed budget ends at the prompt's rows.
@pytest.mark.parametrize(
    ("method", "percents"),
    [("h2o", (100, 65, 35, 15)), ("fastv", (100, 90, 85, 75)), ("streaming", (100, 65, 35, 15))],
)
def test_a_budget_picks_settings_that_use_and_keep_it(
    checkpoint: Checkpoints, method: str, percents: tuple[int, ...]
) -> None:
    runtime = Runtime.load(checkpoint("llama-gqa-full"), threaded=False)
    full = runtime.generate(IMAGES, PROMPT, Options(max_new_tokens=STEPS)).result().kv.bytes_peak
    peaks = []
    for percent in percents:
        options = Options(method=method, kv_budget=full * percent // 100, max_new_tokens=STEPS)
        result = runtime.generate(IMAGES, PROMPT, options).result()
        peaks.append(result.kv.bytes_peak)
        assert full * (percent - 5) // 100 < peaks[-1] <= full * percent // 100
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("method", "parameters", "word"),
    [
        (H2O, {"budget": 0}, "budget must be above 0"),
        (H2O, {"budget": 101}, "budget must be above 0"),
        (H2O, {"budget": float("nan")}, "budget must be above 0"),
        (H2O, {"heavy": -1}, "heavy must be from 0 to 100"),
        (H2O, {"heavy": 100.5}, "heavy must be from 0 to 100"),
        (H2O, {"grow": 2}, "grow must be 0"),
        (FastV, {"drop": -1}, "drop (R)"),
        (FastV, {"drop": 101}, "drop (R)"),
        (FastV, {"drop": float("nan")}, "drop (R)"),
        (FastV, {"layer": 0}, "layer (K)"),
        (FastV, {"layer": 1.5}, "layer (K)"),
        (FastV, {"layer": float("inf")}, "layer (K)"),
        (Streaming, {"sinks": -1}, "sinks must be a whole number of rows"),
        (Streaming, {"sinks": 0.5}, "sinks must be a whole number of rows"),
        (Streaming, {"window": 0}, "window must be a whole number of rows"),
        (Streaming, {"window": float("inf")}, "window must be a whole number of rows"),
        (Streaming, {"window": float("nan")}, "window must be a whole number of rows"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(method: Any, parameters: dict[str, float], word: str) -> None:
    with pytest.raises(BadInput) as refusal:
        method(**parameters)
    assert word in str(refusal.value)


def test_the_published_defaults() -> None:
    assert H2O() == H2O(budget=50, heavy=50, grow=0)
    assert FastV() == FastV(layer=2, drop=50)
    assert Streaming() == Streaming(sinks=4, window=1020)
    prompt = PromptShape(35, 576, 36)
    assert H2O().peak_rows(prompt, 100, 32) == 32 * (647 // 2 + 1)
    assert FastV().peak_rows(prompt, 100, 32) == 32 * 747 - 30 * 288
    assert Streaming().peak_rows(prompt, 100, 32) == 32 * 747
    assert Streaming().peak_rows(PromptShape(35, 2880, 36), 100, 32) == 32 * 1025


def test_counts_are_those_of_the_decimal_percent() -> None:
    """In binary 32.3 % of 1000 come to 322.99...; and so for every percent with one decimal."""
    assert share(1000, 32.3) == 323
    assert H2O(budget=32.3).rows(1000, 50) == 323
    assert FastV(drop=67.7).kept(1000) == 323
    for tenths in range(1, 1001):
        for count in (64, 576, 647, 1000):
            assert share(count, tenths / 10) == count * tenths // 1000


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_what_the_user_fixed_stays_and_the_dial_shrinks(method: str) -> None:
    prompt = PromptShape(35, 576, 36)
    fixed = {"h2o": {"heavy": 30, "grow": 1}, "fastv": {"layer": 3}, "streaming": {"sinks": 2}}[method]
    dial = {"h2o": "budget", "fastv": "drop", "streaming": "window"}[method]
    for given in ({}, fixed, {dial: 7}, {**fixed, dial: 7}):
        candidates = list(METHODS[method].ladder(given))
        peaks = [each.peak_rows(prompt, 50, 32) for each in candidates]
        assert peaks == sorted(peaks, reverse=True)
        for each in candidates:
            assert {name: getattr(each, name) for name in given} == given
    full = METHODS["full"]().peak_rows(prompt, 50, 32)
    peaks = [each.peak_rows(prompt, 50, 32) for each in METHODS[method].ladder({})]
    assert peaks[0] == full
    assert peaks[-1] < 0.2 * full
