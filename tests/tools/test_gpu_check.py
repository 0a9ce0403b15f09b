"""tools/gpu without a GPU: every check passes on kernels that are right and fails on kernels that are not, and the
command says in one line that there is no CUDA."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from avl_edge.attention.cuda import Kernels, KernelShape, NoCuda
from avl_edge.attention.cuda.driver import Argument, Grid
from avl_edge.backends.cuda import CudaBackend
from avl_edge.backends.stored import StoredRows
from avl_edge.backends.tensorrt.attention import Attention, Sizes
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.spec import read_spec
from tests.conftest import Checkpoints
from tests.equipment import trt_calls
from tests.equipment.cuda_on_cpu import HostDevice, ReferenceModule, at
from tests.equipment.emulated_kernels import COMPILER
from tools.gpu import check, decode, low_rank, model_speed, numerics, packed, plugin, report, sanitize, speed
from tools.gpu.dut import CheckFailed, row_type

SHAPES = (KernelShape(80, 4, "Half"), KernelShape(128, 1, "Bfloat"))


class HostUnderTest:
    """The CPU, with reference kernels, or those that ``make`` gives."""

    def __init__(self, make: Callable[[KernelShape, torch.dtype], ReferenceModule] = ReferenceModule) -> None:
        self.accelerator = HostDevice()
        self._make = make

    def kernels(self, shape: KernelShape) -> Kernels:
        module = self._make(shape, row_type(shape))
        return Kernels(module, shape, packed=module.packed)


class Wrong(ReferenceModule):
    """Reference kernels, of which one does its work a little wrong."""

    def __init__(self, fault: str, shape: KernelShape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._fault = fault

    def launch(self, kernel: str, grid: Grid, threads: int, stream: int, arguments: Sequence[Argument]) -> None:
        if self._fault == "nothing is appended" and kernel == "avl_append":
            return
        if self._fault == "positions are one off" and kernel == "avl_attend_low_rank":
            positions = at(arguments[6], torch.int32, int(at(arguments[5], torch.int32, grid[2]).max()))
            positions -= 1
            super().launch(kernel, grid, threads, stream, arguments)
            positions += 1
            return
        super().launch(kernel, grid, threads, stream, arguments)
        getattr(self, self._fault.replace(" ", "_"), lambda *_: None)(kernel, grid, arguments)

    def a_score_is_off(self, kernel: str, _: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_scores":
            at(arguments[6], torch.float32, 1)[0] += 1e-3

    def scores_run_over(self, kernel: str, _: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_scores":
            capacity = int(arguments[5].value or 0)
            at(arguments[6], torch.float32, capacity)[-1] = 0

    def an_output_is_off(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_merge":
            out = at(arguments[7], self._dtype, grid[1], int(arguments[4].value or 0), self._dim)
            out[1, 0, 0] += 1

    def an_empty_selection_is_left_alone(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_merge":
            counts = at(arguments[2], torch.int32, grid[1] + 1).diff()
            out = at(arguments[7], self._dtype, grid[1], int(arguments[4].value or 0), self._dim)
            out[counts == 0] = float("nan")

    def neighbours_matter(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_merge":
            out = at(arguments[7], self._dtype, grid[1], int(arguments[4].value or 0), self._dim)
            out *= 1 + 0.02 * (grid[1] > 1)

    def a_packed_part_is_left_out(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_attend" and not self._format.is_exact:
            splits, heads = int(arguments[12].value or 0), grid[0] * self._group
            first = int(arguments[11].value or 0)
            at(arguments[14], torch.float32, grid[2], splits, heads, 2)[:, first] = torch.tensor([-3e38, 0.0])

    def a_low_rank_part_is_left_out(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_attend_low_rank":
            splits, heads = int(arguments[15].value or 0), grid[0] * self._group
            first = int(arguments[14].value or 0)
            at(arguments[20], torch.float32, grid[2], splits, heads, 2)[:, first] = torch.tensor([-3e38, 0.0])

    def a_scale_is_off(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_append" and not self._format.is_exact:
            ids = at(arguments[2], torch.int32, grid[0])
            records = self._records(arguments[8], ids[ids >= 0], int(arguments[3].value or 0))
            records[ids[0].long(), 1] ^= 1

    def a_record_runs_over(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_append" and not self._format.is_exact:
            ids = at(arguments[2], torch.int32, grid[0])
            size = self._records(arguments[9], ids[ids >= 0], int(arguments[3].value or 0)).shape[1]
            at(arguments[9], torch.uint8, size + 1)[size] = 0

    def a_scan_is_off(self, kernel: str, grid: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_scan" and self._format.name == "int8":
            begin = int(at(arguments[3], torch.int32, grid[2])[1])
            at(arguments[8], torch.float32, begin + 1)[begin] += 1

    def one_row_too_many_is_chosen(self, kernel: str, _: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_nucleus":
            flags = at(arguments[8], torch.int8, 100)
            flags[flags == 0] = 1

    def a_prompts_last_is_off(self, kernel: str, _: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_prompt_scores":
            at(arguments[6], torch.float32, 1)[0] += 1e-3

    def a_prompts_total_is_off(self, kernel: str, _: Grid, arguments: Sequence[Argument]) -> None:
        if kernel == "avl_prompt_scores":
            at(arguments[7], torch.float32, 1)[0] += 1e-3


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
        ("a scan is off", packed.check_choice),
        ("one row too many is chosen", packed.check_choice),
        ("a low rank part is left out", low_rank.check_shape),
        ("positions are one off", low_rank.check_shape),
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
        ours = made._rows
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


# Figures


def test_attention_is_timed_over_the_bytes_that_are_said() -> None:
    load = speed.Load(batch=2, selected=20, rows=50, heads=4, kv_heads=2, head_dim=64, layers=2)
    assert load.bytes == 2 * 20 * 2 * 2 * 64 * 2
    row = speed.attention(HostUnderTest(), load, copy=10.0, rounds=2)
    assert row["ms"] > 0
    assert row["torch_full_ms"] > 0
    assert abs(row["gb_per_s"] - load.bytes / 1e6 / row["ms"]) <= 0.06 + 0.01 * row["gb_per_s"]
    assert speed.copy_bandwidth(HostUnderTest(), nbytes=2**20, rounds=2) > 0


def test_enough_layers_that_no_cache_holds_their_rows() -> None:
    for load in (speed.Load(1, 702), speed.Load(16, 2340)):
        larger = speed.beyond_caches(load)
        assert larger.layers * larger.bytes >= 512 * 2**20
        assert larger.layers >= 4


def test_low_rank_rows_are_timed_over_their_bases() -> None:
    load = speed.Load(batch=2, selected=20, rows=50, heads=4, kv_heads=2, head_dim=64, layers=2, format="lowrank:16@5")
    assert load.bytes == 2 * (20 * 2 * 16 + 5 * 2 * 2 * 64 * 2), "five coefficients end within a unit of 16 bytes"
    assert speed.beyond_caches(load) == load
    layers = speed.Layers(HostUnderTest(), load)
    kernels = layers._kernels._modules
    layers.selected()
    assert kernels["exact"].launched == ["avl_attend_low_rank", "avl_merge"] * 2
    assert speed.attention(HostUnderTest(), load, copy=10.0, rounds=2)["ms"] > 0


def test_what_is_timed_is_attention_over_the_selected_rows() -> None:
    load = speed.Load(batch=2, selected=20, rows=50, heads=4, kv_heads=2, head_dim=64, layers=1)
    layers = speed.Layers(HostUnderTest(), load)
    layers.selected()
    case = numerics.Case(layers.query, *layers.pools[0], layers.rows, layers.offsets)
    expected, _ = numerics.reference(case)
    assert (layers.out.double() - expected).abs().max() < 2e-3
    chosen = layers.rows.view(2, 20)
    assert all(len(set(rows.tolist())) == 20 for rows in chosen)
    assert chosen[1].min() >= 50, "each sequence has rows of its own"


def test_a_models_steps_are_timed_with_the_bytes_that_they_read() -> None:
    sizes = model_speed.Sizes(layers=2, hidden=128, inner=64, heads=2, vocabulary=50, image=64, steps=12)
    found = model_speed.cases(HostUnderTest(), sizes, batches=(1, 2))
    full, avl = found["cases"][:2]
    assert (full["method"], avl["method"]) == ("full", "avl")
    assert avl["kv_bytes_per_step"] < full["kv_bytes_per_step"]
    assert full["step_ms"] > 0
    pack = found["cases"][5]
    assert (pack["method"], pack["format"]) == ("attentionpack", "exact/lowrank:64/lowrank:64@16")
    assert pack["step_ms"] > 0
    assert found.keys() >= {"full_to_avl_step_at_1", "full_to_avl_step_at_2"}
    weights = model_speed.Model(HostUnderTest(), sizes).bytes
    per_layer = 4 * 128 * 128 + 3 * 128 * 64 + 2 * 128
    assert weights == 2 * (2 * per_layer + 128 + 50 * 128), "decoder and head, without the embedding"


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
    assert len(names) == len(set(names)) == 30 + 30 + 30 + 6 + 2 + 2 + 2
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
