"""`avl-edge eval` as a person meets it: one document or a table, mistakes in one line, goes on after an interrupt."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from avl_edge.cli import run_app
from avl_edge.measure.evaluate import Answer, AnswerLog
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.command_line import Outcome

TIMES = {"prefill_ms", "ms_per_token"}


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> str:
    return str(checkpoint("mistral-gqa"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions about three pictures; of the other lines none can be asked."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        random_image(number, (90, 70)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    rows: list[dict[str, Any]] = [
        {"image": "0.png", "question": "What is shown?", "answers": ["a boat"], "kind": "what"},
        {
            "image": "1.png",
            "question": "How many people are there in the picture?",
            "answers": ["two"],
            "kind": "count",
        },
        {"image": "2.png", "question": "Read the sign.", "answers": ["open", "OPEN"], "kind": "what"},
        {"image": "broken.png", "question": "What is shown?", "answers": ["nothing"]},
        {"image": "lost.png", "question": "What is shown?", "answers": ["nothing"]},
        {"image": "0.png", "question": "What? " * 2000, "answers": ["nothing"]},
        {"image": "0.png", "question": "Where?", "answers": ["here"]},
    ]
    lines = [json.dumps(row).encode() for row in rows]
    lines[4:4] = [b'{"image": "0.png", "question": "W', b'{"image": "0.png", "question": "\xff", "answers": ["x"]}']
    (folder / "questions.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "questions.jsonl"


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], model: str, data: Path):  # type: ignore[no-untyped-def]
    """``evaluate(*options)`` on the small model and the seven lines; a later option replaces an earlier one."""

    def call(*options: str) -> Outcome:
        common = ["eval", "--model", model, "--data", str(data), "--max-new-tokens", "6"]
        code = run_app([*common, *options])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def _without_times(document: dict[str, Any]) -> dict[str, Any]:
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in document["results"]]
    return {**document, "results": rows, "command": "", "machine": {}}


OTHERS = ("avl", "coarse", "h2o", "fastv", "streaming")
ALL = ("--methods", ",".join(("full", *OTHERS)), "--kv-fraction", "0.85,0.65")


class TestCommand:
    def test_json_is_one_document_with_a_row_per_setting(self, evaluate) -> None:
        outcome = evaluate("--json", *ALL)
        document = json.loads(outcome.out)
        assert (outcome.code, outcome.out.count("\n")) == (0, 1)
        settings = [(row["method"], row["kv_fraction"]) for row in document["results"]]
        assert settings == [("full", 1.0), *((name, share) for name in OTHERS for share in (0.85, 0.65))]
        full, *rest = document["results"]
        assert full["token_identity"] == full["rows_read_fraction"] == full["bytes_stored_fraction"] == 1
        for row in rest:
            assert 0 <= row["token_identity"] <= 1
            assert 0 < row["rows_read_fraction"] < 1
            assert 0 < row["bytes_stored"] <= row["bytes_peak"] < full["bytes_peak"]
            assert row["ms_per_token"] > 0
            assert row["score"] == row["exact_match"]
            assert row["questions"] == document["questions"] == 4
            assert row["new_tokens"] == 6
        assert set(full["by_kind"]) == {"what", "count"}

    def test_what_cannot_be_asked_is_named_and_the_rest_goes_on(self, evaluate) -> None:
        outcome = evaluate("--json", "--methods", "full")
        problems = {row["where"]: row["reason"] for row in json.loads(outcome.out)["problems"]}
        assert set(problems) == {"line 4", "line 5", "line 6", "line 7", "line 8"}
        assert "broken.png' is damaged" in problems["line 4"]
        assert problems["line 5"] == "it is not valid JSON"
        assert problems["line 6"] == "it is not UTF-8 text"
        assert "there is no picture" in problems["line 7"]
        assert "context" in problems["line 8"]
        for where, reason in problems.items():
            assert f"avl-edge: {where} was left out: {reason}\n" in outcome.err

    def test_a_table_for_people(self, evaluate) -> None:
        outcome = evaluate(*ALL)
        assert outcome.code == 0
        assert all(f"\n{method}" in outcome.out for method in ("full", *OTHERS))
        assert max(map(len, outcome.out.splitlines())) <= 80
        assert "…" not in outcome.out

    def test_a_sample_and_another_metric(self, evaluate) -> None:
        document = json.loads(evaluate("--json", "--methods", "full", "--questions", "2", "--metric", "anls").out)
        found_later = sum(row["where"] in ("line 4", "line 8") for row in document["problems"])
        assert (document["questions"] + found_later, document["metric"]) == (2, "anls")
        (row,) = document["results"]
        assert row["score"] == row["anls"]

    def test_attention_is_watched_on_the_questions_that_can_be_asked(self, evaluate) -> None:
        """A picture that cannot be read costs its question, not the whole evaluation."""
        outcome = evaluate("--methods", "full", "--attention", "100", "--json")
        assert outcome.code == 0
        document = json.loads(outcome.out)
        seen = document["attention"]
        assert document["problems"]
        assert seen["questions"] == document["questions"]
        assert all(0 < share <= 1 for share in seen["holds"])
        assert all(0 <= each <= 1 for row in seen["ppci"] for each in row if each is not None)

    def test_a_share_that_a_method_cannot_keep_is_left_out_with_its_least(self, evaluate) -> None:
        outcome = evaluate("--json", "--methods", "full,fastv", "--kv-fraction", "0.9,0.1")
        document = json.loads(outcome.out)
        assert [row["method"] for row in document["results"]] == ["full", "fastv"]
        (left_out,) = document["unreachable"]
        assert (left_out["method"], left_out["kv_fraction"]) == ("fastv", 0.1)
        assert "fastv cannot hold this prompt in 10 % of full attention's memory: the least is" in outcome.err

    def test_plots(self, evaluate, tmp_path: Path) -> None:
        assert evaluate("--json", *ALL, "--plots", str(tmp_path / "new" / "plots")).code == 0
        folder = tmp_path / "new" / "plots"
        names = [f"{plot}_bytes.{suffix}" for plot in ("latency", "quality") for suffix in ("png", "svg")]
        assert sorted(path.name for path in folder.iterdir()) == names
        for name in names:
            if name.endswith("svg"):
                ElementTree.parse(folder / name)
                drawn = (folder / name).read_text()
                assert all(f"<!-- {method} -->" in drawn for method in ("full", *OTHERS))
            else:
                Image.open(folder / name).verify()

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--methods", "full,magic"], 2, "unknown method 'magic'"),
            (["--methods", "full,full:format=lowrank:999"], 2, "asks for more directions than there are"),
            (["--methods", "avl:magic=1"], 2, "takes no 'magic'"),
            (["--methods", "avl:refresh"], 2, "give NAME=VALUE"),
            (["--methods", "avl:refresh=-1"], 2, "refresh (K)"),
            (["--methods", ","], 2, "name one with --methods"),
            (["--kv-fraction", "half"], 2, "cannot read --kv-fraction 'half'"),
            (["--kv-fraction", "1.5"], 2, "must be above 0 and at most 1"),
            (["--kv-fraction", "nan"], 2, "must be above 0 and at most 1"),
            (["--metric", "bleu"], 2, "unknown metric 'bleu'"),
            (["--data", "nowhere.jsonl"], 2, "there is no data"),
            (["--model", "nowhere"], 2, "there is no model"),
            (["--methods", "avl", "--kl"], 2, "name full in --methods too"),
            (["--methods", "fastv", "--kv-fraction", "0.01"], 3, "fastv cannot hold this prompt"),
            (["--out", "no/such/folder/r.json"], 2, "cannot be written"),
            (["--plots", "/dev/null/plots"], 2, "no plots can be written"),
            (["--questions", "0"], 2, "--questions"),
            (["--threads", "100000"], 2, "--threads"),
            (["--out", "."], 2, "is a folder"),
        ],
    )
    def test_mistakes_are_one_line(self, evaluate, options: list[str], code: int, message: str) -> None:
        outcome = evaluate("--json", *options)
        assert (outcome.code, outcome.out) == (code, "")
        assert message in outcome.err.splitlines()[-1]
        assert outcome.err.splitlines()[-1].startswith("avl-edge: ")

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("avl:secondary_format=int9", "the secondary format must be one of exact, int8, int8/int4, int4"),
            ("avl:format=", "the text format must be"),
            ("coarse:core_format=int8", "give core and secondary rows the same format"),
            ("full:text_format=lowrank:8", "text rows cannot be low-rank"),
            ("avl:tertiary_format=int8", "give NAME=VALUE with a number"),
        ],
    )
    def test_formats_that_are_none_are_one_line(self, evaluate, method: str, message: str) -> None:
        outcome = evaluate("--methods", method)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert message in outcome.err

    def test_questions_that_all_turn_out_to_be_bad_are_one_line(self, evaluate, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"no picture")
        path = tmp_path / "questions.jsonl"
        path.write_text('{"image": "a.png", "question": "What?", "answers": ["this"]}')
        outcome = evaluate("--json", "--data", str(path))
        assert outcome.code == 2
        assert "no question could be asked (line 1: " in outcome.err

    def test_the_package_imports_without_the_extra(self) -> None:
        program = (
            "import sys; sys.modules.update(dict.fromkeys(('rapidfuzz', 'matplotlib', 'pycocoevalcap')));"
            "from avl_edge.cli import run_app; sys.exit(run_app(['eval', '--plots', 'x']))"
        )
        outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert outcome.returncode == 2
        assert outcome.stderr == "avl-edge: --plots needs matplotlib: pip install 'avl-edge[eval]'\n"


FEW = ("--kl", "--methods", "full,avl,h2o", "--kv-fraction", "0.85,0.65")


class TestResuming:
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def whole(cls, model: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        """An evaluation that nothing interrupted."""
        cls.out = tmp_path_factory.mktemp("whole") / "whole.json"
        common = ["eval", "--model", model, "--data", str(data), "--max-new-tokens", "6"]
        assert run_app([*common, *FEW, "--out", str(cls.out)]) == 0
        cls.expected = json.loads(cls.out.read_text())

    def test_an_interrupted_evaluation_ends_like_a_whole_one(
        self, evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left, add = 13, AnswerLog.add

        def interrupted(log: AnswerLog, answer: Answer) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            add(log, answer)

        out = tmp_path / "parts.json"
        with monkeypatch.context() as patch:
            patch.setattr(AnswerLog, "add", interrupted)
            outcome = evaluate(*FEW, "--out", str(out))
        assert outcome.code == 130
        assert "the same command goes on" in outcome.err
        kept = tmp_path / "parts.answers.jsonl"
        assert len(kept.read_text().splitlines()) == 14
        assert not out.exists()
        # The machine went down in the middle of a line.
        kept.write_bytes(kept.read_bytes()[:-20])

        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(AnswerLog, "add", lambda log, answer: (asked.append(answer), add(log, answer)))
            assert evaluate(*FEW, "--out", str(out)).code == 0
        assert len(asked) == 4 * 5 - 12
        assert _without_times(json.loads(out.read_text())) == _without_times(self.expected)

    def test_a_finished_evaluation_is_told_again_word_for_word(self, evaluate) -> None:
        again = json.loads(evaluate("--json", *FEW, "--out", str(self.out)).out)
        assert again["results"] == self.expected["results"]

    def test_more_settings_can_be_asked_later(self, evaluate, tmp_path: Path) -> None:
        out = tmp_path / "grown.json"
        assert evaluate("--kl", "--methods", "full,avl", "--kv-fraction", "0.5", "--out", str(out)).code == 0
        assert evaluate(*FEW, "--out", str(out)).code == 0
        assert _without_times(json.loads(out.read_text())) == _without_times(self.expected)

    @pytest.mark.parametrize("options", [["--questions", "2"], ["--max-new-tokens", "5"], ["--kl"]])
    def test_answers_to_something_else_are_refused(self, evaluate, tmp_path: Path, options: list[str]) -> None:
        out = str(tmp_path / "r.json")
        assert evaluate("--methods", "full", "--out", out).code == 0
        before = (tmp_path / "r.answers.jsonl").read_bytes()
        outcome = evaluate("--methods", "full", "--out", out, *options)
        assert outcome.code == 2
        assert "holds the answers of another evaluation" in outcome.err
        assert (tmp_path / "r.answers.jsonl").read_bytes() == before
