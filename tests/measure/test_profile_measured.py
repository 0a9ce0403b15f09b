"""The profiler: its arithmetic against made-up machines, and itself on a small random model.

How well a profile predicts is measured by `avl-edge profile --verify`; the test of that waits for a quiet machine.
Bytes are an invariant: what was seen is never above what is predicted.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.cli import run_app
from avl_edge.machine import profile
from avl_edge.machine.profile import ANY, COSTS, BadProfile, Sample, unit_ms
from avl_edge.measure import profiler
from avl_edge.measure.profiler import Measured, trials
from avl_edge.measure.profiler.fit import fit_prices, predicted, quality, solve
from avl_edge.measure.profiler.measure import fit_peaks, predicted_peak, samples_of
from avl_edge.measure.profiler.timing import forget_peak, peak_bytes, per_step, resident_bytes, undisturbed
from avl_edge.model.known import known_shape
from tests.conftest import Checkpoints

DECODE = [name for name in COSTS if name.startswith("decode")]


# Arithmetic


def test_undisturbed_times_by_hand() -> None:
    assert undisturbed([5.0]) == 5
    assert undisturbed([9, 1, 100, 3]) == 2
    assert undisturbed([9, 1, 100, 3, 2]) == 2
    # cycles of three: means 2, 5 and 20; the odd step at the end is left out; the faster half are the first two
    assert per_step([1, 2, 3, 4, 5, 6, 20, 20, 20, 99], 3) == 3.5
    assert per_step([4, 2], 3) == 3


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**31))
def test_least_squares_meet_the_conditions_of_an_optimum(unknowns: int, points: int, seed: int) -> None:
    """Karush-Kuhn-Tucker: nothing negative, no gradient where positive, no way down where zero; and no point of a
    grid around it is better."""
    chance = np.random.default_rng(seed)
    matrix, target = chance.random((points, unknowns)), chance.normal(size=points)
    x = solve(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all()
    assert np.abs(gradient * x).max() < 1e-4
    assert gradient.min() > -1e-4
    best = np.linalg.norm(matrix @ x - target)
    for corner in product((0.0, 0.5, 1.5), repeat=min(unknowns, 3)):
        other = x.copy()
        other[: len(corner)] *= corner
        assert best <= np.linalg.norm(matrix @ other - target) + 1e-6


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.5, 200), min_size=len(DECODE), max_size=len(DECODE)), st.integers(0, 2**31))
def test_the_prices_of_a_made_up_machine_are_found(prices: list[float], seed: int) -> None:
    """Amounts as of real requests; a machine whose steps cost exactly so, within two percent of noise."""
    truth, chance = dict(zip(DECODE, prices, strict=True)), np.random.default_rng(seed)
    model = known_shape("llava-1.5-7b")
    samples = []
    for number, trial in enumerate(trials(model, 40, seed % 1000)):
        amounts = samples_of(model, trial, Measured(0, 0, 0, 0), held_out=False)[0].amounts
        ms = sum(truth[name] * amount * unit_ms(name) for name, amount in amounts.items())
        samples.append(Sample("decode", "", ms * chance.uniform(0.98, 1.02), 1, amounts, held_out=number % 4 == 3))
    found = fit_prices([sample for sample in samples if not sample.held_out], {})
    fit = quality(samples, found)
    assert (fit.fitted_points, fit.held_out_points) == (30, 10)
    assert fit.worst_error_percent < 6


def test_what_is_known_decides_between_what_samples_cannot_tell_apart() -> None:
    """Layers and weights of one model are always the same; 8 ms in all, of which 2 are known to be the weights."""
    amounts = {"decode_us_per_layer": 10.0, "decode_ms_per_gb_of_weights": 1.0}
    samples = [Sample("decode", "", 8.0, 1, amounts)] * 6
    found = fit_prices(samples, {"decode_ms_per_gb_of_weights": 2.0})
    assert found["decode_ms_per_gb_of_weights"] == pytest.approx(2, rel=0.01)
    assert found["decode_us_per_layer"] == pytest.approx(600, rel=0.01)
    assert predicted(samples[0], found) == pytest.approx(8, rel=0.01)


def test_peak_memory_is_seen() -> None:
    forget_peak()
    before = resident_bytes()
    block = np.ones(50_000_000, dtype=np.uint8)
    assert block.sum() == 50_000_000
    del block
    assert peak_bytes() - before == pytest.approx(50e6, rel=0.1)
    forget_peak()
    assert peak_bytes() - before < 10e6


def test_trials_are_repeatable_and_fit_the_context() -> None:
    for name, context in (("llava-1.5-7b", 4096), ("qwen-vl", 2048)):
        model = known_shape(name)
        drawn = list(trials(model, 60, 3))
        assert drawn == list(trials(model, 60, 3)) != list(trials(model, 60, 4))
        tokens = model.picture(336, 336).tokens
        assert all(trial.prompt(tokens).length + trial.steps < context for trial in drawn)
        assert {trial.method.name for trial in drawn} == {"full", "avl", "h2o", "fastv", "streaming"}
        assert {trial.images for trial in drawn} == {0, 1, 2, 3}


# On a small random model


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("mistral-gqa")


@pytest.fixture(scope="module")
def path(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile that the command wrote."""
    path = tmp_path_factory.mktemp("profiles") / "mine.yaml"
    assert run_app(["profile", "--model", str(model), "--out", str(path), "--seconds", "1", "--threads", "1"]) == 0
    return path


def test_the_profile_says_what_was_measured(path: Path, model: Path) -> None:
    found = profile.read(path)
    record = found.models[model.name]
    assert set(found.models) == {ANY, model.name}
    assert {getattr(record.costs, name).basis for name in COSTS} == {"measured"}
    # No vision block is measured alone: for other models its price is taken from prefill's matrices.
    unmeasured = {name for name in COSTS if getattr(found.models[ANY].costs, name).basis == "derived"}
    assert unmeasured == {"vision_ms_per_tflop"}
    assert set(record.fit) == {"decode", "prefill", "vision"}
    assert record.fit["decode"].fitted_points + record.fit["decode"].held_out_points >= 8
    assert {sample.phase for sample in found.models[ANY].samples} == {"attention", "linear"}
    labels = " ".join(sample.label for sample in found.models[ANY].samples)
    assert all(part in labels for part in ("float32", "bfloat16", "128 rows", "2048 rows", "batch 4"))
    assert found.memory.bandwidth_bytes_per_s.value > 1e8
    budgets = record.budgets
    assert budgets
    whole = sum(
        part.value
        for part in (budgets.weights_bytes, budgets.overhead_bytes, budgets.kv_pool_bytes, budgets.reserve_bytes)
    ) + max(budgets.vision_bytes.value, budgets.activations_bytes.value)
    assert whole <= found.memory.available_bytes.value + 1


def test_profiling_again_merges_and_a_damaged_file_stays(path: Path, model: Path, tmp_path: Path) -> None:
    before = profile.read(path)
    command = ["profile", "--model", str(model), "--seconds", "1", "--threads", "1", "--out"]
    other = tmp_path / "again.yaml"
    profile.save(profile.merged(before, before), other)
    assert profile.read(other) == before
    other.write_text(other.read_text()[:-200])
    damaged = other.read_bytes()
    assert run_app([*command, str(other)]) == 2
    assert other.read_bytes() == damaged


def test_verify_compares_and_prints(path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_app(
        [
            "profile",
            "--verify",
            "--model",
            str(model),
            "--out",
            str(path),
            "--requests",
            "3",
            "--threads",
            "1",
            "--json",
        ]
    )
    document = json.loads(capsys.readouterr().out)
    assert code == (0 if document["holds"] else 1)
    assert len(document["requests"]) == 3
    for each in document["requests"]:
        assert each["predicted_ms_per_token"] > 0
        assert each["measured_peak_bytes"] > 0


def test_another_number_of_threads_is_not_mixed_in(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = profile.read(path)
    other = path.with_name("eight.yaml")
    profile.save(replace(before, versions={**before.versions, "threads": "8"}), other)
    assert run_app(["profile", "--out", str(other), "--threads", "1"]) == 2
    assert "measured with 8 threads, not 1" in capsys.readouterr().err


def test_a_model_that_was_not_profiled_is_not_verified(
    path: Path, checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    other = checkpoint("llama-mha")
    assert run_app(["profile", "--verify", "--model", str(other), "--out", str(path), "--threads", "1"]) == 2
    assert "profile that model first" in capsys.readouterr().err


def test_predicted_peaks_cover_requests_that_were_not_seen(model: Path) -> None:
    bench = profiler.Bench(model, model.name)
    for trial in trials(bench.shape, 2, seed=0):
        bench.measure(trial)
    seen = [(trial, bench.measure(trial)) for trial in trials(bench.shape, 12, seed=1)]
    peaks = fit_peaks(bench.shape, seen)
    for trial in trials(bench.shape, 6, seed=11):
        measured = bench.measure(trial).peak_bytes
        assert measured <= predicted_peak(bench.shape, peaks, trial) <= 1.1 * measured


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("AVL_EDGE_TIMINGS") != "1",
    reason="times of a machine that others use are no invariant: set AVL_EDGE_TIMINGS=1 on a quiet one",
)
def test_a_profile_of_the_demo_model_keeps_its_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "demo.yaml")
    assert run_app(["profile", "--out", path, "--seconds", "40", "--threads", "1"]) == 0
    capsys.readouterr()
    assert run_app(["profile", "--verify", "--out", path, "--json"]) == 0, capsys.readouterr().out


def test_verifying_names_the_profile_that_lacks_the_model(model: Path) -> None:
    bench = profiler.Bench(model, "unheard-of")
    with pytest.raises(BadProfile, match="unheard-of"):
        profiler.verify(bench, profile.shipped()["cpu-x86"], 1, 0)
