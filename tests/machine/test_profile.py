"""Profiles as files: what is read, what is refused and by which name, and which profile is for which machine."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.cli import run_app
from avl_edge.errors import BadInput
from avl_edge.machine import device, profile
from avl_edge.machine.profile import ANY, BadProfile, DeviceProfile, Figure, Fit, Record, Sample
from tests import ROOT
from tests.equipment.machines import TREES
from tools.derive_profiles import profiles as derived_profiles

SHIPPED = profile.shipped()
ORIN = SHIPPED["agx-orin-64-30w"]
TEXT = profile.dumps(ORIN)


def _measured() -> DeviceProfile:
    """A profile such as the profiler writes, with a fit and samples."""
    figure = Figure(1.5, "measured", "fit")
    samples = (
        Sample("decode", "full, 1 image", 3.25, 24, {"decode_us_per_layer": 8.0}),
        Sample("decode", "full, 2 images", 4.5, 24, {"decode_us_per_layer": 8.0}, held_out=True),
    )
    any_model = ORIN.models[ANY]
    record = Record(
        replace(any_model.costs, decode_us_per_layer=figure),
        any_model.peaks,
        None,
        {"decode": Fit(1, 1, 2, 3)},
        samples,
    )
    return replace(ORIN, name="mine", models={ANY: any_model, "demo": record})


# What is shipped


def test_every_power_mode_of_both_modules_and_two_processors_are_shipped() -> None:
    modes = {(each.device.name, each.power_mode.name if each.power_mode else None) for each in SHIPPED.values()}
    assert modes == {
        *(("agx-orin-64", mode) for mode in ("MAXN", "MODE_15W", "MODE_30W", "MODE_50W")),
        *(("agx-orin-32", mode) for mode in ("MAXN", "MODE_15W", "MODE_30W", "MODE_40W")),
        ("cpu-x86", None),
        ("cpu-arm64", None),
    }


def _figures(part: Any) -> list[Figure]:
    if isinstance(part, Figure):
        return [part]
    if isinstance(part, dict):
        return [figure for each in part.values() for figure in _figures(each)]
    if hasattr(part, "__dataclass_fields__"):
        return [figure for each in fields(part) for figure in _figures(getattr(part, each.name))]
    return []


@pytest.mark.parametrize("each", SHIPPED.values(), ids=SHIPPED)
def test_nobody_measured_what_is_shipped_and_it_never_says_so(each: DeviceProfile) -> None:
    figures = _figures(each)
    assert len(figures) >= 20
    assert {figure.basis for figure in figures} == {"derived"}
    assert all(figure.origin for figure in figures)
    text = profile.report(each)
    assert len(re.findall(r"  derived  ", text)) == len(figures)
    assert "measured" not in text
    assert "not measured" in profile.svg(each)


@pytest.mark.parametrize("each", derived_profiles(), ids=lambda each: each.name)
def test_shipped_files_are_what_the_tool_derives(each: DeviceProfile) -> None:
    assert SHIPPED[each.name] == each


def test_derived_numbers_by_hand() -> None:
    """204.8 GB/s at 3199 MHz, 136.5 at 2133 MHz; of it 156/204.8; 62,780 MB; 42.6 TFLOPS at MAXN, half of it.

    At 15 W 3 of 8 TPCs are left, at 408 of 1300.5 MHz: 5.01 TFLOPS.
    """
    slow, fast = SHIPPED["agx-orin-64-15w"], SHIPPED["agx-orin-64-maxn"]
    papers = [each.memory.paper_bandwidth_bytes_per_s for each in (fast, slow)]
    assert [paper.value / 1e9 for paper in papers if paper] == pytest.approx([204.8, 136.5], rel=1e-3)
    assert fast.memory.bandwidth_bytes_per_s.value / 1e9 == pytest.approx(156, rel=1e-3)
    assert fast.memory.total_bytes.value / 2**20 == pytest.approx(62_780, rel=1e-4)
    assert fast.models[ANY].costs.prefill_ms_per_tflop.value == pytest.approx(1000 / 21.3, rel=2e-3)
    assert slow.models[ANY].costs.prefill_ms_per_tflop.value == pytest.approx(2 * 1000 / 5.01, rel=2e-3)
    assert slow.models[ANY].costs.decode_ms_per_gb_of_rows.value == pytest.approx(1000 / 104, rel=2e-3)


# Reading and writing


def test_a_file_reads_back_as_it_was(tmp_path: Path) -> None:
    for each in (*SHIPPED.values(), _measured()):
        profile.save(each, tmp_path / "profiles" / "p.yaml")
        assert profile.read(tmp_path / "profiles" / "p.yaml") == each
    assert os.listdir(tmp_path / "profiles") == ["p.yaml"]


_floats = st.floats(0, 1e6, allow_nan=False).map(lambda value: float(f"{value:.6g}"))


@settings(max_examples=40, deadline=None)
@given(value=_floats, basis=st.sampled_from(["measured", "derived"]), origin=st.text(max_size=40))
def test_any_figure_reads_back(value: float, basis: Any, origin: str) -> None:
    costs = replace(ORIN.models[ANY].costs, decode_us_per_layer=Figure(value, basis, origin))
    changed = replace(ORIN, models={ANY: replace(ORIN.models[ANY], costs=costs)})
    assert profile.loads(profile.dumps(changed), "text") == changed


@pytest.mark.parametrize("text", [TEXT, profile.dumps(_measured())], ids=["shipped", "measured"])
def test_a_file_cut_anywhere_is_refused(text: str) -> None:
    for end in range(0, len(text), 37):
        with pytest.raises(BadProfile):
            profile.loads(text[:end], "half.yaml")
    with pytest.raises(BadProfile, match="cut off"):
        profile.loads(text[: text.index("# end")], "half.yaml")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(TEXT)), st.integers(0, 40), st.text(max_size=12))
def test_damaged_files_are_refused_by_name_or_read(start: int, length: int, patch: str) -> None:
    try:
        profile.loads(TEXT[:start] + patch + TEXT[start + length :], "damaged.yaml")
    except BadProfile as error:
        assert "damaged.yaml" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        ("version: 1", "version: 2", "version 2.*reads version 1"),
        ("version: 1", "version: true", "version True"),
        ("name: agx-orin-64-30w", "nome: x", "unknown key 'nome': did you mean name"),
        ("reserve_bytes", "reserve_gigabytes", "unknown key 'reserve_gigabytes'.*reserve_bytes"),
        (r"\n *decode_ms_per_tflop: .*", "", "lacks decode_ms_per_tflop"),
        (r"total_bytes: {value: [\d.e+]+", "total_bytes: {value: 64", "total_bytes is 64, .*another unit"),
        (r"bandwidth_bytes_per_s: {value: [\d.e+]+", "bandwidth_bytes_per_s: {value: 156", "another unit"),
        (r"available_bytes: {value: [\d.e+]+", "available_bytes: {value: 9.0e+13", "more than the total"),
        (r"decode_us_per_layer: {value: 0.0", "decode_us_per_layer: {value: .nan", "finite"),
        (r"decode_us_per_layer: {value: 0.0", "decode_us_per_layer: {value: -3", "0 or more"),
        (r"decode_us_per_layer: {value: 0.0", "decode_us_per_layer: {value: 1e30", "another unit|must be a number"),
        (r"decode_us_per_layer: {value: 0.0", "decode_us_per_layer: {value: 3 ms", "must be a number"),
        (r"decode_us_per_layer: {value: 0.0", f"decode_us_per_layer: {{value: 1{'0' * 400}", "finite"),
        (r"samples: \[\]", "samples: [{phase: decode, label: x, ms: 0, runs: 1, amounts: {}}]", "a time of 0 ms"),
        (r"samples: \[\]", "samples: [{phase: decode, label: x, ms: 1, runs: 1, amounts: {beer: 1}}]", "beer"),
        (r"workspace_percent: {value: 100.0", "workspace_percent: {value: 0.5", "another unit"),
        ("basis: derived", "basis: guessed", "must be one of measured, derived, not 'guessed'"),
        ("kind: jetson", "kind: toaster", "must be one of jetson, linux"),
        ("  any:", "  all:", "lacks 'any'"),
        ("power_mode:", "name: twice\npower_mode:", "a key stands twice"),
        ("modules:", "modules: 3\n  module:", "must be a list|unknown key"),
        ("device:\n", "device: []\nspare:\n", "must be a mapping|unknown key"),
        ("name: agx", "name: !!python/object/apply:os.getcwd []\nx: agx", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(pattern: str, replacement: str, message: str) -> None:
    text, count = re.subn(pattern, replacement.replace("\\", ""), TEXT, count=1)
    assert count == 1
    with pytest.raises(BadProfile, match=rf"(?s)wrong\.yaml.*({message})"):
        profile.loads(text, "wrong.yaml")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "large.yaml").write_bytes(b"#" * (9 << 20))
    for name in ("binary", "empty", "folder", "large", "missing"):
        with pytest.raises(BadProfile, match=name):
            profile.read(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "p.yaml"
    profile.save(ORIN, path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(BadProfile, match="No space left"):
        profile.save(_measured(), path)
    assert path.read_text() == TEXT
    assert os.listdir(tmp_path) == ["p.yaml"]


def test_a_write_that_does_not_read_back_leaves_the_old_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    profile.save(ORIN, path)
    broken = replace(ORIN, memory=replace(ORIN.memory, total_bytes=Figure(1.0, "derived", "")))
    with pytest.raises(BadProfile):
        profile.save(broken, path)
    assert path.read_text() == TEXT


# Which profile is for which machine


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ("agx-orin-64-jp62", "agx-orin-64"),
        ("agx-orin-64-jp72", "agx-orin-64"),
        ("agx-orin-32-jp62", "agx-orin-32"),
        ("agx-orin-32-jp72", "agx-orin-32"),
        ("pc-no-gpu", "cpu-x86"),
        ("container-limit", "cpu-x86"),
    ],
)
def test_a_recorded_machine_finds_its_profile(tree: str, name: str) -> None:
    facts = device.probe(TREES / tree)
    found = profile.for_machine(facts)
    assert found.device.name == name
    if found.power_mode:
        assert found.power_mode.name == facts.power.mode_name
    local = profile.with_memory(found, facts)
    assert local.memory.available_bytes == Figure(
        facts.memory.usable_bytes or 0, "measured", local.memory.available_bytes.origin
    )


def test_a_machine_without_a_profile_is_told_what_to_do() -> None:
    with pytest.raises(BadProfile, match=r"p3767.*avl-edge profile"):
        profile.for_machine(device.probe(TREES / "orin-nano-jp62"))


def test_another_machine_or_power_mode_is_refused_by_name() -> None:
    facts = device.probe(TREES / "agx-orin-64-jp62")
    mode = facts.power.mode_name
    profile.require_match(profile.named("agx-orin-64", mode), facts, "--replace")
    other = next(each for each in SHIPPED.values() if each.power_mode and each.power_mode.name not in (mode, "MAXN"))
    with pytest.raises(BadProfile, match=r"power mode|agx-orin-32.*--replace"):
        profile.require_match(other, facts, "--replace")
    with pytest.raises(BadProfile, match=r"agx-orin-32 .*--replace"):
        profile.require_match(SHIPPED["agx-orin-32-maxn"], facts, "--replace")
    with pytest.raises(BadProfile, match=r"cpu-x86 \(linux\).*jetson"):
        profile.require_match(SHIPPED["cpu-x86"], facts, "--replace")


def test_a_jetson_that_does_not_tell_its_module_finds_its_own_profile() -> None:
    facts = device.probe(TREES / "agx-orin-64-jp62")
    facts = replace(facts, identity=replace(facts.identity, module_id=None))
    mine = replace(ORIN, device=profile.device_of(facts), power_mode=profile.mode_of(facts))
    profile.require_match(mine, facts, "--replace")
    with pytest.raises(BadProfile, match="agx-orin-32"):
        profile.require_match(SHIPPED["agx-orin-32-maxn"], facts, "--replace")


def test_own_profiles_come_before_shipped_ones(tmp_path: Path) -> None:
    facts = device.probe(TREES / "pc-no-gpu")
    mine = replace(SHIPPED["cpu-x86"], name="mine", device=profile.device_of(facts))
    profile.save(mine, tmp_path / "mine.yaml")
    assert profile.for_machine(facts, profile.own(tmp_path)) == mine
    stranger = replace(mine, device=replace(mine.device, cpu="another processor"))
    assert profile.for_machine(facts, [stranger]).name == "cpu-x86"


def test_what_is_measured_in_the_repository_is_not_among_what_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There `profiles/` holds the shipped ones, which are newer here."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    facts = device.probe()
    mine = replace(ORIN, name="mine", date="2020-01-01", device=profile.device_of(facts))
    profile.save(replace(mine, power_mode=profile.mode_of(facts)), tmp_path / "profiles" / "measured" / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert run_app(["profile", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "mine"


def test_names_and_power_modes() -> None:
    assert profile.named("AGX-Orin-64", "30w") == profile.named("agx-orin-64", "MODE_30W") == ORIN
    assert profile.named("agx-orin-64", None) == ORIN  # the default mode of the device
    assert profile.named("agx-orin-64-15w", None).name == "agx-orin-64-15w"
    with pytest.raises(BadProfile, match=r"no power mode '40W'.*maxn, 15w|15w.*50w"):
        profile.named("agx-orin-64", "40W")
    with pytest.raises(BadProfile, match="no power modes"):
        profile.named("cpu-x86", "30W")
    with pytest.raises(BadInput, match="agx-orin-32"):
        profile.named("toaster", None)


def test_profiling_again_adds_to_what_is_known() -> None:
    old = _measured()
    again = Sample("decode", "full, 1 image", 9.0, 24, {"decode_us_per_layer": 8.0})
    record = replace(old.models["demo"], samples=(again,))
    other = replace(old.models["demo"], samples=())
    new = replace(old, name="fresh", date="2027-01-01", models={ANY: old.models[ANY], "demo": record, "llava": other})
    merged = profile.merged(old, new)
    assert (merged.name, merged.date) == ("mine", "2027-01-01")
    assert set(merged.models) == {ANY, "demo", "llava"}
    assert [sample.ms for sample in merged.models["demo"].samples] == [4.5, 9.0]


# The command


def test_show_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "mine.yaml", tmp_path / "mine.svg"
    profile.save(_measured(), path)
    profile.save(_measured(), path.with_suffix(""))
    assert run_app(["profile", "show", str(path.with_suffix(""))]) == 0  # a file of any name is a file
    capsys.readouterr()
    assert run_app(["profile", "show", str(path), "--svg", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "1.5 us  measured  fit" in out
    assert "fit of decode: 1 points" in out
    texts = {each.text for each in ElementTree.fromstring(plot.read_text()).findall(".//{*}text")}
    assert {"measured ms", "predicted ms", "fitted", "held out", "mine, 2026-11-21"} <= texts
    assert run_app(["profile", "show", "agx-orin-64", "--power", "50W", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["power_mode"] == {"id": 3, "name": "MODE_50W"}
    assert run_app(["profile", "show", str(path), "--power", "30W"]) == 0
    assert run_app(["profile", "show", str(path), "--power", "50W"]) == 2
    assert "mine is not of power mode 50W" in capsys.readouterr().err
    assert yaml.safe_load(TEXT)["name"] == "agx-orin-64-30w"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "toaster"], "no device 'toaster'"),
        (["show", "missing.yaml"], "no profile missing.yaml"),
        (["--model", "missing"], "no model 'missing'"),
        (["--verify", "--out", "missing.yaml"], "measure first"),
        (["--seconds", "0"], "--help"),
        (["--out", "/dev/null/mine.yaml"], "cannot be written"),
        (["--out", ".", "--replace"], "cannot be written (it is a folder)"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_app(["profile", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_measuring_into_another_machines_profile_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "orin.yaml"
    profile.save(ORIN, path)
    assert run_app(["profile", "--out", str(path)]) == 2
    assert "agx-orin-64 (jetson)" in capsys.readouterr().err
    assert path.read_text() == TEXT
