"""`avl-edge eval --data text:FILE` as a person meets it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from avl_edge.cli import run_app
from avl_edge.machine import device
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import CORPUS
from tests.equipment.command_line import Outcome


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], checkpoint: Checkpoints, tmp_path: Path):  # type: ignore[no-untyped-def]
    """``evaluate(*options)`` on two small texts."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name + " ".join(CORPUS))
    data = f"text:{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}"

    def call(*options: str) -> Outcome:
        common = ["eval", "--model", str(checkpoint("qwen2-gqa")), "--data", data, "--window", "40"]
        code = run_app([*common, "--prompt-tokens", "30", *options])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def test_json_is_one_document_with_a_row_per_setting(evaluate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out.json"
    outcome = evaluate("--json", "--out", str(out), "--methods", "full:format=int8,h2o:grow=1,coarse")
    document = json.loads(outcome.out)
    assert outcome.code == 0
    assert document == json.loads(out.read_text())
    assert [row["method"] for row in document["results"]] == ["full", "full:format=int8"]
    assert document["command"].startswith("avl-edge")
    assert document["machine"]["threads"] >= 1
    assert (document["tokens"], document["dtype"], document["windows"]) == (20, "float32", 2)
    assert [each["method"] for each in document["unreachable"]] == ["h2o:grow=1", "coarse"]
    assert outcome.err.count("a setting was left out") == 2
    assert "--as-image" in outcome.err


def test_the_table_has_a_line_for_each_setting(evaluate) -> None:  # type: ignore[no-untyped-def]
    outcome = evaluate("--methods", "full:format=int8,coarse", "--as-image", "10", "--kv-fraction", "0.9")
    assert outcome.code == 0
    assert "of which 10 are held as an image's" in " ".join(outcome.out.split())
    assert all(name in outcome.out for name in ("full", "coarse", "perplexity"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "anls"], "--metric is about questions"),
        (["--max-new-tokens", "5"], "--max-new-tokens is about questions"),
        (["--window", "600"], "longer than this model's context of 512"),
        (["--prompt-tokens", "40"], "has no room for a prompt of 40"),
        (["--windows", "100"], "fewer than 100 x 40: give a longer text"),
        (["--data", "text:"], "there is no text"),
        (["--data", "demo"], "--window is about texts"),
        (["--methods", "full:format=int9"], "int9"),
    ],
)
def test_mistakes_take_one_line(evaluate, options: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    outcome = evaluate(*options)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


def test_a_single_predicted_token_has_no_step_to_read_for(evaluate) -> None:  # type: ignore[no-untyped-def]
    outcome = evaluate("--prompt-tokens", "39", "--methods", "full:format=int8")
    assert outcome.code == 0
    assert [line.split()[-1] for line in outcome.out.splitlines() if line.startswith("full")] == ["-", "-"]


def test_rows_that_this_machine_has_no_memory_for_are_refused(evaluate, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    facts = device.probe("/")
    little = replace(facts, memory=replace(facts.memory, available_bytes=10_000, total_bytes=20_000))
    monkeypatch.setattr(device, "probe", lambda _: little)
    outcome = evaluate("--methods", "full:format=int8")
    assert outcome.code == 3
    assert "10.0 kB are free: name fewer --methods" in outcome.err


def test_settings_that_none_can_be_evaluated_are_a_refusal(evaluate) -> None:  # type: ignore[no-untyped-def]
    outcome = evaluate("--methods", "coarse,distinct")
    assert outcome.code == 3
    assert "--as-image" in outcome.err
