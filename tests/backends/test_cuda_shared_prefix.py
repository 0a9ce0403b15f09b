"""Shared prefixes on the GPU backend: a picture's rows, left by `prefill_prefix`, and the questions that read them,
against the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from avl_edge.config import Formats
from avl_edge.kv.methods import Avl, Coarse, Distinct, Full, Method
from avl_edge.model.network.decoder import Decoder
from avl_edge.request import Prompt
from tests.conftest import Checkpoints
from tests.equipment.cuda_on_cpu import HostDevice
from tests.equipment.cuda_sides import STEP_OF, PrefixSide, both, prefixes, random_prompt, run_both

FORMATS = {
    "exact": Formats(),
    "int8": Formats("int8", "int8", "int8"),
    "int4": Formats("exact", "int4", "int4"),
    "text packed": Formats("int4", "exact", "exact"),
}
QUESTIONS: dict[str, Method] = {
    "full": Full(),
    "avl": Avl(secondary=100, prefill_keep=100, core=30, refresh=3, text_keep=60, text_floor=4),
    "avl-mean": Avl(secondary=100, prefill_keep=100, core=20, prompt_mean=1, refresh=2),
    "coarse": Coarse(core=30, mass=80),
}
PART: dict[str, Method] = {
    "distinct": Distinct(60),
    "avl": Avl(secondary=60, prefill_keep=100, by_values=1, core=30, prompt_mean=1, refresh=2),
    "coarse": Coarse(secondary=60, core=30),
}


def _prefixes(
    directory: Path, images: int, method: Method, formats: Formats
) -> tuple[PrefixSide, PrefixSide, HostDevice, list[Prompt]]:
    oracle, ours, device = both(directory)
    sides, prompts = prefixes([oracle, ours], images, method, formats)
    return sides[0], sides[1], device, prompts


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("method", QUESTIONS)
@pytest.mark.parametrize(("name", "images"), [("llama-gqa-full", 2), ("qwen2-gqa", 1)])
def test_questions_equal_the_oracles(
    checkpoint: Checkpoints, name: str, images: int, method: str, formats: str
) -> None:
    """Logits, rows, tiers and counts of three questions that join one after another: of many tokens, of one."""
    chosen = FORMATS[formats]
    oracle, ours, _, prompts = _prefixes(checkpoint(name), images, Full(), chosen)
    for got, expected in zip(ours.shared.totals, oracle.shared.totals, strict=True):
        assert np.abs(got - expected).max() <= 1e-5
        assert (images > 1) == bool(expected.any()), "of text between two pictures"
    requests = [(prompt, QUESTIONS[method], chosen) for prompt in prompts]
    run_both(oracle, ours, requests, STEP_OF[chosen.text])


@pytest.mark.parametrize("formats", ["exact", "int4"])
@pytest.mark.parametrize("method", PART)
def test_a_shared_prefix_of_what_stands_out_equals_the_oracles(
    checkpoint: Checkpoints, method: str, formats: str
) -> None:
    chosen = FORMATS[formats]
    oracle, ours, _, prompts = _prefixes(checkpoint("llama-gqa-full"), 2, Distinct(60), chosen)
    for got, expected in zip(ours.shared.rows, oracle.shared.rows, strict=True):
        assert got.image_positions.tolist() == expected.image_positions.tolist()
    run_both(oracle, ours, [(prompt, PART[method], chosen) for prompt in prompts], STEP_OF[chosen.text])


def test_questions_of_all_methods_share_a_batch_with_plain_requests(checkpoint: Checkpoints) -> None:
    oracle, ours, device, prompts = _prefixes(checkpoint("llama-mha"), 1, Full(), FORMATS["int8"])
    requests = [(prompts[0], method, FORMATS["int8"]) for method in QUESTIONS.values()]
    requests.append((random_prompt(oracle.spec, 9), Full(), Formats()))
    device.log.clear()
    run_both(oracle, ours, requests, STEP_OF["int8"])
    assert device.log.count("synchronize") == device.log.count("replay") + len(requests), (
        "a prompt and a step wait once each"
    )


def test_scores_of_a_question_come_in_pieces(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queries begin where the prefix ends, in every piece."""
    oracle, ours, device, prompts = _prefixes(checkpoint("llama-gqa-full"), 1, Full(), Formats())
    device.launched.clear()
    monkeypatch.setattr("avl_edge.backends.cuda.backend.LOGITS_BYTES", 4 * 4 * len(prompts[2]) * 7)
    run_both(oracle, ours, [(prompts[2], QUESTIONS["avl-mean"], Formats())], 1e-4, steps=2)
    assert device.launched.count("avl_prompt_logits") == ours.spec.text.layers * -(-31 // 7)


def test_a_shared_prefix_is_there_when_it_returns(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody asked for its logits."""
    monkeypatch.setattr(Decoder, "logits", None)
    *_, device, _ = _prefixes(checkpoint("llama-mha"), 1, Full(), Formats())
    assert device.log == ["synchronize"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat"])
def test_half_precision_is_as_close_as_its_rounding(checkpoint: Checkpoints, dtype: torch.dtype) -> None:
    oracle, ours, _, prompts = _prefixes(checkpoint("llama-gqa-full", dtype=dtype), 2, Full(), Formats())
    requests: list[tuple[Prompt, Method, Formats]] = [(prompt, Full(), Formats()) for prompt in prompts]
    run_both(oracle, ours, requests, 8 * torch.finfo(dtype).eps)
