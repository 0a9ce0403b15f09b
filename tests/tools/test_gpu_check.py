"""tools/gpu without a GPU: every check passes on kernels that are right and fails on kernels that are not, and the
command says in one line that there is no CUDA."""

from __future__ import annotations

import itertools
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from avl_edge.attention.cuda import KernelShape, NoCuda
from avl_edge.backends.cuda import CudaBackend
from avl_edge.backends.stored import StoredRows
from avl_edge.backends.tensorrt.attention import Attention, Sizes
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec
from avl_edge.model.sampling import Sampler
from tests.conftest import Checkpoints
from tests.equipment import trt_calls
from tests.equipment.cuda_on_cpu import HostDevice
from tests.equipment.emulated_kernels import COMPILER
from tests.equipment.host_under_test import HostUnderTest, Wrong
from tools.gpu import check, decode, low_rank, numerics, packed, plugin, report, sampling, sanitize
from tools.gpu.dut import CheckFailed

SHAPES = (KernelShape(80, 4, "Half"), KernelShape(128, 1, "Bfloat"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numerics_pass_on_kernels_that_are_right(shape: KernelShape) -> None:
    found = numerics.check_shape(HostUnderTest(), shape)
    assert found.keys() == {"out_relative", "out_max", "scores_max", "prompt_scores_max"}
    assert all(value == value for value in found.values())
    found = packed.check_shape(HostUnderTest(), shape)
    assert found.keys() == {"mixed_out_max", "mixed_scores_max", "scan_max"}
    assert all(value <= 1e-2 for value in found.values())
    found = low_rank.check_shape(HostUnderTest(), shape)
    assert found.keys() == {"low_rank_out_max", "low_rank_scores_max"}
    assert all(value <= 1e-2 for value in found.values())


@pytest.mark.parametrize(
    ("fault", "numeric"),
    [
        ("a score is off", numerics.check_step),
        ("scores run over", numerics.check_step),
        ("an output is off", numerics.check_step),
        ("an empty selection is left alone", numerics.check_step),
        ("neighbours matter", numerics.check_alone),
        ("nothing is appended", numerics.check_append),
        ("a packed part is left out", packed.check_mixture),
        ("an output is off", packed.check_mixture),
        ("a score is off", packed.check_mixture),
        ("a scale is off", packed.check_packing),
        ("a record runs over", packed.check_packing),
        ("nothing is appended", packed.check_packing),
        ("a query is not smoothed", packed.check_smoothing),
        ("all keys are smoothed", packed.check_smoothing),
        ("a scan is off", packed.check_choice),
        ("one row too many is chosen", packed.check_choice),
        ("a low rank part is left out", low_rank.check_shape),
        ("positions are one off", low_rank.check_shape),
        ("a query is not smoothed", low_rank.check_shape),
        ("a score is off", low_rank.check_shape),
        ("a prompts last is off", numerics.check_prompt),
        ("a prompts total is off", numerics.check_prompt),
    ],
)
def test_numerics_fail_on_kernels_that_are_wrong(fault: str, numeric: Callable[..., Any]) -> None:
    wrong = HostUnderTest(lambda shape, dtype: Wrong(fault, shape, dtype))
    with pytest.raises(CheckFailed):
        numeric(wrong, SHAPES[1])
    numeric(HostUnderTest(), SHAPES[1])


def test_every_head_size_and_row_type_is_checked_with_grouped_heads() -> None:
    shapes = set(numerics.shapes())
    assert {shape.head_dim for shape in shapes} == {64, 80, 96, 128, 256}
    assert {shape.row for shape in shapes} == {"Half", "Bfloat"}
    assert len(shapes) == 30
    counts = numerics.border_counts(SHAPES[0], splits=3)
    assert {0, 1, SHAPES[0].tile, 3 * 4 * SHAPES[0].tile + 1} <= set(counts)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> decode.Model:
    directory = checkpoint("llama-bf16")
    return decode.Model(read_spec(directory), load_weights(directory))


def test_decode_checks_pass_on_kernels_that_are_right(model: decode.Model) -> None:
    half = decode.Model(model.spec, decode.AsHalf(model.weights))
    for each in (model, half):
        assert 0 <= decode.check_against_cpu(HostUnderTest(), each)["logits"] <= torch.finfo(each.weights.dtype).eps
    assert 0 <= decode.check_packed_against_cpu(HostUnderTest(), half)["logits"] <= 1 / 254
    assert decode.check_sessions_against_cpu(HostUnderTest(), half).keys() == {"logits_exact", "logits_packed"}
    assert 0 <= decode.check_low_rank_against_cpu(HostUnderTest(), half)["logits"] <= torch.finfo(torch.float16).eps
    assert decode.check_graphs(HostUnderTest(), model) == {"logits": 0.0}


@pytest.mark.parametrize(
    ("fault", "decodes"),
    [
        ("an output is off", decode.check_against_cpu),
        ("nothing is appended", decode.check_against_cpu),
        ("an output is off", decode.check_sessions_against_cpu),
        ("nothing is appended", decode.check_sessions_against_cpu),
        ("nothing is appended", decode.check_low_rank_against_cpu),
        ("a low rank part is left out", decode.check_low_rank_against_cpu),
        ("positions are one off", decode.check_low_rank_against_cpu),
    ],
)
def test_decode_checks_fail_on_kernels_that_are_wrong(
    model: decode.Model, fault: str, decodes: Callable[..., Any]
) -> None:
    with pytest.raises(CheckFailed, match="logits"):
        decodes(HostUnderTest(lambda shape, dtype: Wrong(fault, shape, dtype)), model)


def test_rows_that_are_read_at_other_places_are_noticed(model: decode.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device alone, of an image session's rows the order is turned."""
    after = StoredRows.after

    def turned(self: StoredRows, *arguments: Any) -> Any:
        keys, values = after(self, *arguments)
        return (keys, values.flip(0)) if self is ours else (keys, values)

    def backend(*arguments: Any, **options: Any) -> CudaBackend:
        nonlocal ours
        made = decode_backend(*arguments, **options)
        ours = made.rows
        return made

    ours: StoredRows | None = None
    decode_backend = decode.backend
    monkeypatch.setattr(decode, "backend", backend)
    monkeypatch.setattr(StoredRows, "after", turned)
    with pytest.raises(CheckFailed, match="logits"):
        decode.check_sessions_against_cpu(HostUnderTest(), model)


def test_a_recording_that_goes_its_own_way_is_noticed(model: decode.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that captured the first step's numbers as constants would repeat that step."""

    def stuck(_: HostDevice, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return lambda: None

    monkeypatch.setattr(HostDevice, "record", stuck)
    with pytest.raises(CheckFailed):
        decode.check_graphs(HostUnderTest(), model)


# The sanitizer, the plugin


def _fake_sanitizer(folder: Path, status: int) -> str:
    program = folder / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/arguments\necho "ERROR SUMMARY: 3 errors"\nexit {status}\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return str(folder)


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_the_sanitizer_runs_the_numerics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    monkeypatch.setenv("PATH", _fake_sanitizer(tmp_path, 0), prepend=":")
    assert sanitize.check_sanitizer(tool) == {"summary": "ERROR SUMMARY: 3 errors"}
    assert f"--tool {tool}" in (tmp_path / "arguments").read_text()
    assert (tmp_path / "arguments").read_text().strip().endswith("-m tools.gpu.small")


def test_what_the_sanitizer_finds_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", _fake_sanitizer(tmp_path, sanitize.FOUND), prepend=":")
    with pytest.raises(CheckFailed, match="memcheck ended with 86: ERROR SUMMARY: 3 errors"):
        sanitize.check_sanitizer("memcheck")


def test_without_a_sanitizer_the_check_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(report.Skipped, match="compute-sanitizer is not in the PATH"):
        sanitize.check_sanitizer("memcheck")


def test_without_tensorrt_the_plugin_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "find_spec", lambda name: None if name == "tensorrt" else object())
    with pytest.raises(report.Skipped, match="tensorrt is not installed"):
        plugin.check_plugin(HostUnderTest())


def _tensorrt() -> Any:
    """As much of TensorRT's bindings as a plugin is made of."""
    bases = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One")
    return SimpleNamespace(
        **{base: type(base, (), {}) for base in bases},
        PluginField=lambda *values: values,
        PluginFieldType=SimpleNamespace(INT32=1),
        PluginFieldCollection=list,
        DataType=Enum("DataType", "HALF BF16 FLOAT INT32"),
        TensorFormat=Enum("TensorFormat", "LINEAR"),
        TensorRTPhase=Enum("TensorRTPhase", "BUILD RUNTIME"),
    )


@pytest.fixture(scope="module")
def attention(shared_folder: Path) -> Attention:
    """The plugin's kernels, on the CPU."""
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the emulation with")
    shape = trt_calls.Shape(128, 4, "float16")
    shape.compile(shared_folder)
    return shape.attention(shared_folder)


@pytest.mark.slow
@pytest.mark.parametrize("works", ["everything", "nothing", "exact rows", "steps"])
def test_the_plugin_check_on_the_emulated_source(
    attention: Attention, monkeypatch: pytest.MonkeyPatch, works: str
) -> None:
    monkeypatch.setattr(Attention, "load", lambda *_: attention)
    monkeypatch.setattr(plugin, "find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "tensorrt", _tensorrt())
    if works == "everything":
        found = plugin.check_plugin(HostUnderTest())
        for kind in ("", "packed_", "prompt_", "prompt_packed_"):
            assert found[f"{kind}scores_max"] <= 1e-6
            assert found[f"{kind}out_relative"] <= 1e-3
        return
    run = Attention.run

    def run_some(self: Attention, sizes: Sizes, *rest: Any) -> None:
        if {"exact rows": sizes.parts == 1, "steps": sizes.tokens == sizes.sequences}.get(works):
            run(self, sizes, *rest)

    monkeypatch.setattr(Attention, "run", run_some)
    with pytest.raises(CheckFailed, match="output is nan" if works == "steps" else "did not write the new rows"):
        plugin.check_plugin(HostUnderTest())


# The command


def _failing() -> dict[str, float]:
    raise CheckFailed("wrong numbers")


def _skipping() -> dict[str, float]:
    raise report.Skipped("not here")


def test_sampling_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device both sides are alike to the bit."""
    assert max(sampling.check_sampling(HostUnderTest()).values()) == 0
    calls, draw = itertools.count(), Sampler.__call__
    monkeypatch.setattr(
        Sampler, "__call__", lambda own, each: draw(own, each + next(calls) % 2 * torch.randn(len(each)))
    )
    with pytest.raises(CheckFailed, match="tokens differ from the CPU's"):
        sampling.check_sampling(HostUnderTest())


def test_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = report.run([("a", lambda: {"error": 0.5}), ("b", _skipping), ("c", _failing), ("d", dict)])
    assert [(each.verdict, each.reason) for each in outcomes] == [
        ("ok", ""),
        ("skipped", "not here"),
        ("failed", "CheckFailed: wrong numbers"),
        ("ok", ""),
    ]
    assert capsys.readouterr().err.splitlines()[2] == "failed  c: CheckFailed: wrong numbers"
    assert report.exit_code(outcomes) == 1
    assert report.exit_code(outcomes[:2]) == 0


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_on_a_machine_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    checks = [("numerics", lambda: {"worst": 1e-6}), ("more", _failing if broken else _skipping)]
    monkeypatch.setattr(check, "correctness", lambda _: checks)
    out = tmp_path / "measurements" / "gpu.json"
    code = check.check(lambda: (HostUnderTest(), {"gpu": "a GPU", "arch": "sm_87"}), "*", False, out, "the command")
    assert code == int(broken)
    document = json.loads(out.read_text())
    assert document.keys() == {"command", "date", "machine", "seconds", "checks"}
    assert document["command"] == "the command"
    assert document["machine"]["gpu"] == "a GPU"
    assert document["machine"]["torch"] == version("torch")
    assert [each["verdict"] for each in document["checks"]] == ["ok", "failed" if broken else "skipped"]
    assert list(out.parent.iterdir()) == [out]


def test_only_some_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dut = HostUnderTest()
    names = [name for name, _ in check.correctness(dut) + check.speeds(dut)]
    assert len(names) == len(set(names)) == 30 + 30 + 30 + 6 + 3 + 2 + 2
    assert [name for name, _ in check.chosen(check.correctness(dut), "d128*Half")] == []
    assert len(check.chosen(check.correctness(dut), "*d128*Half")) == 9
    assert len(check.chosen(check.correctness(dut), "sanitizer")) == 2
    assert check.check(lambda: (dut, {"arch": "sm_87"}), "nonsense", True, tmp_path / "out.json", "") == 2
    assert "no check is named like 'nonsense'" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_without_cuda_it_is_one_line_and_exit_code_2() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: run tools/gpu/check.py itself")
    for module in ("tools.gpu.check", "tools.gpu.small"):
        run = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=120)
        assert run.returncode == NoCuda.exit_code == 2
        assert len(run.stderr.splitlines()) == 1
        assert "torch" in run.stderr
        assert not run.stdout
