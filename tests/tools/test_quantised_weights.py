"""Weights through int8 and int4 and back: the quantiser is its formula, scaling changes no function and loses less."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from avl_edge.errors import BadInput
from avl_edge.model.checkpoint import load_weights
from tests import ROOT
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import CORPUS
from tools.quantised_weights import (
    POWERS,
    Site,
    factors_of,
    inputs_of,
    make_checkpoint,
    quantise,
    quantised,
    sites_of,
)

IDS = list(range(20, 60))


def rounded(weight: npt.NDArray[np.float64], levels: int, group: int) -> npt.NDArray[np.float64]:
    """The formula in float64, but for the scale, which is stored in float16."""
    grouped = weight.reshape(len(weight), -1, group)
    scales = (np.abs(grouped).max(-1, keepdims=True) / levels).astype(np.float16).astype(np.float64)
    whole = np.rint(np.divide(grouped, scales, out=np.zeros_like(grouped), where=scales > 0))
    return (np.clip(whole, -levels, levels) * scales).reshape(weight.shape)


def loaded(directory: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(directory).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([IDS])).logits[0]
    return found


@given(st.integers(0, 1000), st.sampled_from([7, 127]), st.sampled_from([8, 16, 48]))
def test_the_quantiser_is_its_formula(seed: int, levels: int, group: int) -> None:
    rng = np.random.default_rng(seed)
    # Sixteenths of whole numbers: of the groups' quotients few lie where float32 and float64 round apart.
    weight = rng.integers(-900, 900, (5, 48)) / 16 * np.exp2(rng.integers(-6, 3, (5, 1)))
    weight[0] = 0
    own = quantised(torch.tensor(weight, dtype=torch.float32), levels, group).double().numpy()
    expected = rounded(weight, levels, group)
    ties = np.abs(own - expected) > 1e-6 * np.abs(weight).max()
    assert ties.mean() < 0.02
    assert np.abs(own - weight).max() <= np.abs(weight).max() / levels * 0.51


@pytest.mark.parametrize("name", ["llama-mha", "llama-bias", "qwen2-gqa"])
def test_factors_that_are_absorbed_change_no_answer(checkpoint: Checkpoints, name: str) -> None:
    model = loaded(checkpoint(name))
    before = logits(model)
    generator = torch.Generator().manual_seed(3)
    for site in sites_of(model, head=True):
        drawn = torch.rand(site.readers[0].in_features, generator=generator) + 0.5
        site.absorb(site.share(drawn))
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=1e-4)


def error_of(site: Site, inputs: torch.Tensor, factors: torch.Tensor, levels: int, group: int) -> float:
    """Squared, summed over outputs and tokens, in float64."""
    wide = site.spread(factors).double().numpy()
    weights = [reader.weight.detach().double().numpy() for reader in site.readers]
    changes = [
        rounded((weight * wide).astype(np.float32).astype(np.float64), levels, group) / wide - weight
        for weight in weights
    ]
    return float(sum(np.square(inputs.double().numpy() @ change.T).sum() for change in changes))


def test_the_factors_are_those_of_the_power_with_the_least_error(checkpoint: Checkpoints) -> None:
    model = loaded(checkpoint("qwen2-gqa"))
    sites = list(sites_of(model, head=True))
    for site, inputs in zip(sites, inputs_of(model, sites, IDS), strict=True):
        magnitude = site.share(inputs.abs().mean(0))
        tried = []
        for power in POWERS:
            factors = magnitude**power
            tried.append(error_of(site, inputs, factors / (factors.max() * factors.min()).sqrt(), 7, 16))
        found = error_of(site, inputs, factors_of(site, inputs, 7, 16), 7, 16)
        assert found == pytest.approx(min(tried), rel=1e-3)
        assert found <= tried[0] * 1.001  # a power of 0 is no scaling at all


def test_what_a_site_reads_is_what_its_layers_are_given(checkpoint: Checkpoints) -> None:
    model = loaded(checkpoint("llama-mha"))
    sites = list(sites_of(model, head=True))
    inputs = inputs_of(model, sites, IDS)
    torch.testing.assert_close(inputs[-1] @ model.lm_head.weight.T, logits(model))
    assert [each.shape for each in inputs] == [(len(IDS), site.readers[0].in_features) for site in sites]


def test_only_linear_layers_of_the_decoder_change(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source, directory = checkpoint("qwen2-gqa"), tmp_path / "int4"
    done = run(str(source), str(directory), "--weights", "int4", "--group", "16")
    assert done.returncode == 0, done.stderr
    names = list(loaded(source).state_dict())
    before, after = (loaded(each).state_dict() for each in (source, directory))
    changed = {name for name in names if not torch.equal(before[name], after[name])}
    assert changed == {name for name in names if "language_model.layers" in name and name.endswith("proj.weight")}
    for name in changed:
        expected = quantised(before[name], 7, 16)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=0)
    load_weights(directory).take("text.layers.0.self_attn.q_proj.weight", 64, 64)  # the runtime's own reader


def test_the_head_and_scales_by_a_text(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source, text = checkpoint("llama-mha"), tmp_path / "text.txt"
    text.write_text(" ".join(CORPUS * 3))
    make_checkpoint(source, tmp_path / "plain", 7, 16, head=True)
    make_checkpoint(source, tmp_path / "aware", 7, 16, head=True, calibration=text)
    models = [loaded(tmp_path / name) for name in ("plain", "aware")]
    for model in models:  # each is a fixed point of its own quantiser
        torch.testing.assert_close(quantised(model.lm_head.weight, 7, 16), model.lm_head.weight, rtol=2e-3, atol=1e-6)
    assert not torch.equal(models[0].model.language_model.norm.weight, models[1].model.language_model.norm.weight)


def test_a_tied_head_is_not_scaled(checkpoint: Checkpoints) -> None:
    model = loaded(checkpoint("qwen2-tied"))
    norm, expected = model.model.language_model.norm.weight.clone(), quantised(model.lm_head.weight.detach(), 127, 8)
    quantise(model, 127, 8, head=True, calibration=IDS)
    torch.testing.assert_close(model.model.language_model.norm.weight, norm, rtol=0, atol=0)
    torch.testing.assert_close(model.model.language_model.embed_tokens.weight, expected, rtol=0, atol=0)


def test_what_does_not_fit_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="groups of 48 do not divide a layer of 64 inputs"):
        make_checkpoint(checkpoint("qwen2-gqa"), tmp_path / "out", 7, 48)
    assert not (tmp_path / "out").exists()
    done = run(str(checkpoint("qwen2-gqa")), str(checkpoint("qwen2-gqa")))
    assert done.returncode == 2
    assert "is there already" in done.stderr
    assert done.stderr.count("\n") == 1


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.quantised_weights", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
