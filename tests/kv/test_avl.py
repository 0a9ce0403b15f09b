"""A-VL against the oracle: the same tokens, and the same rows in every layer after every step."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from avl_edge import BadInput, Options, Runtime
from avl_edge.kv.methods import Avl
from tests.conftest import Checkpoints
from tests.equipment import oracle
from tests.equipment.checkpoints import random_image
from tests.equipment.held_rows import held_rows
from tests.equipment.pixels import stacked

STEPS = 48
PROMPT = "What is shown in the picture, and how many boats are there?"
IMAGES = [random_image(1, (70, 90)), random_image(2, (200, 64))]


def _random_settings(seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    p = rng.randint(20, 100)
    s = rng.randint(5, p)
    return {
        "prefill_keep": p,
        "secondary": s,
        "core": rng.randint(1, s),
        "refresh": rng.randint(0, 5),
        "text_keep": rng.randint(20, 100),
        "text_floor": rng.choice([4, 20]),
        "prune_layer": rng.choice([0, 1, 2, 2]),
        "prompt_mean": seed % 2,
        "by_values": seed // 2 % 2,
    }


CASES = [
    ("llama-mha", 1, {}),
    ("qwen2-gqa", 2, {}),
    ("llama-gqa-full", 1, _random_settings(1)),
    ("llama-bias", 2, _random_settings(2)),
    ("llama3-rope", 1, _random_settings(3)),
    ("mistral-gqa", 2, _random_settings(4)),
    ("mistral-wide", 1, _random_settings(5)),
    ("qwen2-tied", 2, _random_settings(6)),
]


@pytest.mark.parametrize(("name", "images", "settings"), CASES)
def test_tokens_and_rows_equal_the_oracle(
    checkpoint: Checkpoints, name: str, images: int, settings: dict[str, int]
) -> None:
    _assert_equal(checkpoint, name, images, Options("avl", settings), oracle.AvlSettings(**settings))


@pytest.mark.parametrize(("name", "images", "secondary"), [("llama-mha", 1, 37), ("qwen2-gqa", 2, 12)])
def test_distinct_values_equal_the_oracle(checkpoint: Checkpoints, name: str, images: int, secondary: int) -> None:
    """A-VL without a prune, a smaller core or an eviction of text: only what is stored is decided, by values."""
    settings = oracle.AvlSettings(100, secondary, secondary, refresh=0, text_keep=100, by_values=1)
    _assert_equal(checkpoint, name, images, Options("distinct", {"secondary": secondary}), settings)


def _assert_equal(
    checkpoint: Checkpoints, name: str, images: int, options: Options, settings: oracle.AvlSettings
) -> None:
    directory = checkpoint(name, dtype=torch.float64)
    runtime = Runtime.load(directory, threaded=False)
    request = runtime.prepare(IMAGES[:images], PROMPT, replace(options, max_new_tokens=STEPS))
    generation, prompt = runtime.submit(request), request.prompt
    expected = oracle.generate(
        oracle.load_model(directory),
        torch.tensor([prompt.token_ids]),
        torch.from_numpy(stacked(prompt)),
        settings,
        STEPS,
    )
    for step, truth in enumerate(expected):
        event = next(generation)
        assert event.token_id == truth.token, f"step {step}"
        if event.finish_reason is None:
            assert held_rows(generation.cache) == truth.rows, f"step {step}"


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"secondary": 0}, "secondary (S)"),
        ({"secondary": 101}, "secondary (S)"),
        ({"core": -1}, "core (C)"),
        ({"prefill_keep": 200}, "prefill_keep (P)"),
        ({"text_keep": 0}, "text_keep (T)"),
        ({"refresh": -1}, "refresh (K)"),
        ({"refresh": 1.5}, "refresh (K)"),
        ({"core": 50}, "P >= S >= C"),
        ({"prefill_keep": 40}, "P >= S >= C"),
        ({"core": float("nan")}, "core (C)"),
        ({"prompt_mean": 2}, "prompt_mean"),
        ({"by_values": 2}, "by_values"),
    ],
)
def test_symbols_out_of_range_are_refused_by_name(parameters: dict[str, float], word: str) -> None:
    with pytest.raises(BadInput) as refusal:
        Avl(**parameters)  # type: ignore[arg-type]
    assert word in str(refusal.value)
