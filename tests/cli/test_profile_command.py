"""`avl-edge profile`: profiles shown and drawn, and what is refused before anything is measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from avl_edge.cli import run_app
from avl_edge.cli.profiles import OWN_PROFILES, search_path
from avl_edge.machine import device, profile
from tests import ROOT
from tests.equipment.profiles import ORIN, TEXT, measured_profile


def test_show_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "mine.yaml", tmp_path / "mine.svg"
    profile.save(measured_profile(), path)
    profile.save(measured_profile(), path.with_suffix(""))
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


def test_the_search_path_is_one_and_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The work's folder, the user's, the system's (where the unit writes), then what is shipped."""
    folders = [tmp_path / name for name in ("work", "user", "system")]
    monkeypatch.setattr("avl_edge.cli.profiles.search_path", lambda: tuple(folders))
    monkeypatch.setattr("avl_edge.cli.profile.search_path", lambda: tuple(folders))
    facts = device.probe()
    mine = replace(ORIN, device=profile.device_of(facts), power_mode=profile.mode_of(facts))
    for folder in reversed(folders):
        profile.save(replace(mine, name=folder.name), folder / "p.yaml")
        assert run_app(["profile", "list", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["search_path"] == list(map(str, folders))
        (used,) = [row for row in document["profiles"] if row["used"]]
        assert (used["name"], used["from"]) == (folder.name, str(folder / "p.yaml"))
        assert run_app(["profile", "show", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == folder.name
    assert document["profiles"][-1]["from"] == "shipped"
    assert run_app(["profile", "list"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("* work ")
    assert "then those that are shipped" in out


def test_the_unit_writes_where_everybody_looks() -> None:
    unit = (ROOT / "tools/deploy/avl-edge-profile@.service").read_text()
    written = Path(unit.split("WorkingDirectory=")[1].split()[0]) / OWN_PROFILES
    assert written in search_path()
