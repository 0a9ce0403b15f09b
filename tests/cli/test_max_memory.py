"""``--max-memory`` of `avl-edge run` and `avl-edge eval`: one line before anything is loaded, or an answer within."""

from __future__ import annotations

import json
import re

import pytest

from avl_edge.cli import run_app
from avl_edge.cli.memory import spoken
from avl_edge.machine import allocator
from avl_edge.machine.ledger import EntryStats, MemoryStats
from avl_edge.serving.runtime import Runtime

MB = 10**6


@pytest.fixture(autouse=True)
def process_bytes(monkeypatch: pytest.MonkeyPatch) -> int:
    """Other tests leave memory behind: what this process held before a command is what is said here."""
    monkeypatch.setattr(allocator, "resident_bytes", lambda: 300 * MB)
    return 300 * MB


def _least(message: str) -> int:
    found = re.search(r"the smallest that would do is .*?\((\d+) bytes\)", message)
    assert found, message
    return int(found[1])


@pytest.mark.parametrize("prompts", [[], ["--prompt", "How many boats are there?"]])
def test_a_refusal_names_what_would_do(
    run,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[str],
) -> None:
    """It is said before weights are loaded, and a byte less would not do."""
    options = ["--max-new-tokens", "12", *prompts]
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "load_weights", lambda *_, **__: pytest.fail("loaded"))
        least = 50 * MB
        for _ in range(2):  # the model, then the request
            refused = run(*options, "--max-memory", str(least))
            assert (refused.code, refused.out, refused.err.count("\n")) == (3, "", 1)
            least = _least(refused.err)
        assert run(*options, "--max-memory", str(least - 1)).code == 3
    answered = run(*options, "--max-memory", str(least), "--json")
    assert answered.code == 0, answered.err
    document = json.loads(answered.out)
    memory = document["memory"]
    assert memory["limit"] == least
    assert sum(entry["limit"] for entry in memory["entries"].values()) <= least
    assert all(0 <= entry["used"] <= entry["peak"] <= entry["limit"] for entry in memory["entries"].values())
    answer = document["answers"][0] if prompts else document
    assert answer["formats"]["core"] != "exact", "without a budget, rows are packed into what is left"


def test_with_room_the_answer_is_that_of_a_process_without_a_bound(run) -> None:  # type: ignore[no-untyped-def]
    free, bound = (run("--json", *more) for more in ([], ["--max-memory", "2GB"]))
    documents = [json.loads(each.out) for each in (free, bound)]
    assert documents[0]["text"] == documents[1]["text"]
    assert documents[0]["formats"] == documents[1]["formats"]
    assert documents[0]["memory"]["limit"] is None
    assert documents[1]["memory"]["limit"] == 2000 * MB


def test_stats_tell_what_was_held(run) -> None:  # type: ignore[no-untyped-def]
    said = run("--stats", "--max-memory", "2GB").err.splitlines()[-1]
    assert re.fullmatch(r"memory: process 300.0 MB, libraries .*, weights .*, kv pool .*MB of 2.0 GB", said)
    entries = {
        "process": EntryStats(None, 7, 9 * MB),
        "kv_pool": EntryStats(None, 0, MB),
        "pixels": EntryStats(1, 0, 0),
    }
    assert spoken(MemoryStats(None, entries)) == "process 9.0 MB, kv pool 1.0 MB, 10.0 MB in all"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--max-memory", "lots"], 2, "cannot read 'lots' as a size"),
        (["--max-memory", "0"], 2, "max_memory must be more than 0 bytes"),
        (["--max-memory", "2GB", "--kv-budget", "1900MB", "--max-new-tokens", "4"], 0, ""),
        (["--max-memory", "380MB", "--kv-budget", "100kB"], 3, "the smallest that would do is"),
    ],
)
def test_other_words(run, options: list[str], code: int, message: str) -> None:  # type: ignore[no-untyped-def]
    outcome = run(*options)
    assert outcome.code == code, outcome.err
    assert message in outcome.err


def test_an_evaluation_is_bounded_too(model: str, picture: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.txt").write_text("What is shown in the picture? " * 40)
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": picture, "question": "What?", "answers": ["a boat"]}))
    questions = ["eval", "--model", model, "--data", str(tmp_path / "q.jsonl"), "--methods", "full", "--json"]
    texts = ["eval", "--model", model, "--data", f"text:{tmp_path / 'a.txt'}", "--window", "40", "--json"]
    texts += ["--prompt-tokens", "30", "--methods", "full"]
    for command in (questions, texts):
        assert run_app([*command, "--max-memory", "50MB"]) == 3
        assert _least(capsys.readouterr().err) > 300 * MB
        assert run_app([*command, "--max-memory", "2GB", *(["--max-new-tokens", "4"] * (command is questions))]) == 0
        assert json.loads(capsys.readouterr().out)["results"]
    for option in (["--kl"], ["--attention", "1"]):
        assert run_app([*questions, "--max-memory", "2GB", *option]) == 2
        assert "hold more than --max-memory counts" in capsys.readouterr().err
