"""`avl-edge eval` as a person meets it, and its parts: settings, the answers' file, the figures, the divergence."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaForConditionalGeneration

from avl_edge import BadInput, DoesNotFit, Options, Runtime
from avl_edge.cli import run_app
from avl_edge.config import Formats, KvShape, PromptShape
from avl_edge.evaluate import Answer, AnswerLog, Asked, Divergence, Question, Questions, Setting, report, settings_of
from avl_edge.evaluate.attention import ppci, share_that_holds
from avl_edge.evaluate.divergence import kl_per_token
from avl_edge.layout import PAGE_ROWS
from avl_edge.policies import METHODS
from tests.checkpoints import random_image
from tests.conftest import Checkpoints
from tests.oracle import load_model
from tests.oracle_baselines import Case, fastv

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
        {"image": "0.png", "question": "What is <image>?", "answers": ["nothing"]},
        {"image": "0.png", "question": "Where?", "answers": ["here"]},
    ]
    lines = [json.dumps(row).encode() for row in rows]
    lines[4:4] = [b'{"image": "0.png", "question": "W', b'{"image": "0.png", "question": "\xff", "answers": ["x"]}']
    (folder / "questions.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "questions.jsonl"


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


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
        assert "<image>" in problems["line 8"]
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


class TestAnswerLog:
    ANSWER = Answer(0, "avl", 0.1, {"core": 5}, "ein Größe\n", (4, 5), 10, 20, 40, 0.5, 0.4, 1.25, 1 / 3, None)

    def test_answers_come_back_as_they_were(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        AnswerLog(path, {"a": 1}).add(self.ANSWER)
        assert AnswerLog(path, {"a": 1})[Setting("avl", 0.1), 0] == self.ANSWER
        assert (Setting("avl", 0.1), 1) not in AnswerLog(path, {"a": 1})

    def test_a_broken_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        AnswerLog(path, {"a": 1}).add(self.ANSWER)
        path.write_bytes(path.read_bytes() + b'{"question": 1}\n')
        with pytest.raises(BadInput, match=r"line 3 of .* is not an answer"):
            AnswerLog(path, {"a": 1})

    @pytest.mark.parametrize("content", [b"somebody's notes", b"notes\nmore", b"\xff\xfe\n", b"\n"])
    def test_another_file_is_left_alone(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(content)
        with pytest.raises(BadInput, match="holds the answers of another evaluation"):
            AnswerLog(path, {"a": 1})
        assert path.read_bytes() == content

    @pytest.mark.parametrize("cut", range(1, 10))
    def test_a_first_line_that_was_cut_off_is_written_anew(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "a.jsonl"
        AnswerLog(path, {"a": 1})
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        AnswerLog(path, {"a": 1})
        assert path.read_bytes() == whole


class TestSettings:
    @given(
        # AttentionPack's own formats are for rows of more dimensions than these have.
        st.sampled_from([name for name in METHODS if name not in ("full", "attentionpack")]),
        st.integers(1, 100),
        st.builds(PromptShape, st.integers(0, 40), st.integers(1, 2000), st.integers(1, 200)),
        st.integers(1, 12),
    )
    def test_the_share_is_kept_and_used(self, method: str, percent: int, prompt: PromptShape, layers: int) -> None:
        setting, shape = Setting(method, percent / 100), KvShape(layers, 2, 8, 2)
        try:
            options = setting.options(prompt, shape, 10)
        except DoesNotFit:
            return
        assert options.formats == Formats()
        rows = METHODS[method](**options.parameters).peak_rows(prompt, 0, layers)
        held = -(-rows // PAGE_ROWS) * PAGE_ROWS
        allowed = -(-layers * prompt.length * percent // (100 * PAGE_ROWS)) * PAGE_ROWS  # a share in whole pages
        assert held <= allowed
        if method == "h2o":
            assert held > allowed - layers * (1 + prompt.length / 100) - PAGE_ROWS

    @pytest.mark.parametrize(
        ("method", "parameters"),
        [
            ("h2o", {"budget": 50}),  # half of the prompt's 600 rows
            ("avl", {"secondary": 48, "core": 32, "prefill_keep": 90}),  # 276 of 576, and 24 rows of text
            ("fastv", {"layer": 2, "drop": 70}),  # six of eight layers lose 403 or more of 576 tokens
            ("streaming", {"sinks": 4, "window": 296}),
            ("avl:prompt_mean=1:refresh=1", {"secondary": 48, "core": 32, "prompt_mean": 1, "refresh": 1}),
            # Half of 300 pages: 130 of 24 text and 236 core rows in 8 layers, 18 of 121 int4 rows, 56 to a page.
            ("avl:secondary_format=int4", {"secondary": 62, "core": 41, "prefill_keep": 90}),
            # 30 int8 rows to a page: 24 text and 535 image rows in 8 layers.
            ("coarse:format=int8:mass=90", {"secondary": 93, "mass": 90}),
        ],
    )
    def test_half_of_the_demo_models_prompt(self, method: str, parameters: dict[str, float]) -> None:
        options = Setting(method, 0.5).options(PromptShape(4, 576, 20), KvShape(8, 4, 64, 2), 160)
        assert parameters.items() <= {**options.parameters}.items()

    @pytest.mark.parametrize(
        ("method", "formats"),
        [
            ("avl", Formats()),
            ("avl:secondary_format=int8", Formats("exact", "exact", "int8")),
            ("coarse:format=int8:mass=90", Formats("int8", "int8", "int8")),
            ("full:format=int4:text_format=exact", Formats("exact", "int4", "int4")),
            ("full:format=lowrank:8@4+int8", Formats("exact", "lowrank:8@4+int8", "lowrank:8@4+int8")),
        ],
    )
    def test_formats_are_part_of_a_setting(self, method: str, formats: Formats) -> None:
        options = Setting(method, 1.0).options(PromptShape(4, 576, 20), KvShape(8, 4, 64, 2), 160)
        assert (options.method, options.formats) == (method.partition(":")[0], formats)

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("avl:secondary_format=int9", "the secondary format must be exact, int8, int4"),
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

    def test_full_comes_once_and_first(self) -> None:
        settings = settings_of(["avl", "full", "avl"], [0.5, 0.25, 0.5])
        assert settings == [Setting("full"), Setting("avl", 0.5), Setting("avl", 0.25)]


def _answer(question: int, setting: Setting, text: str, token_ids: tuple[int, ...], **changes: Any) -> Answer:
    costs = {
        "bytes_stored": 50,
        "bytes_peak": 60,
        "bytes_full": 100,
        "rows_read_fraction": 0.5,
        "bytes_read_fraction": 0.4,
    }
    times = {"prefill_ms": 10.0, "decode_ms_per_token": 2.0}
    fields = {**costs, **times, **changes}
    return Answer(question, setting.method, setting.kv_fraction, {}, text, token_ids, **fields)


@pytest.fixture(scope="module")
def runtime(model: str) -> Runtime:
    return Runtime.open(model)


class TestReport:
    """Figures worked out by hand."""

    @pytest.fixture
    def rows(self, runtime: Runtime) -> list[dict[str, Any]]:
        items = [Question(f"line {i}", Path(), "?", (text,), kind) for i, (text, kind) in enumerate(QUESTIONS)]
        full, half = Setting("full"), Setting("avl", 0.5)
        answers = {
            full: {0: _answer(0, full, "red", (1, 2, 3)), 1: _answer(1, full, "12 km", (1, 2, 3, 4, 5))},
            half: {
                0: _answer(0, half, "red", (1, 2, 3), bytes_stored=30, rows_read_fraction=0.2),
                1: _answer(1, half, "13", (1, 7, 3), decode_ms_per_token=5.0, rows_read_fraction=0.8, kl_to_full=0.5),
            },
        }
        return report(runtime, Questions("hand", tuple(items), ()), Asked(answers), "exact_match")["results"]

    def test_quality(self, rows: list[dict[str, Any]]) -> None:
        full, half = rows
        assert (full["score"], half["score"]) == (1.0, 0.5)
        assert full["score_interval"] == (1.0, 1.0)
        low, high = half["score_interval"]
        assert (low, high) == (0.0, 1.0)  # of two questions both, one or none may be right
        assert half["character_error_rate"] == 4 / 8
        assert half["by_kind"]["number"] == {"questions": 1, "score": 0.0, "character_error_rate": 4 / 5}
        assert "vqa_accuracy" not in half  # one person's answer each
        assert (full["token_identity"], half["token_identity"]) == (1.0, 5 / 8)
        assert (full["kl_to_full"], half["kl_to_full"]) == (None, 0.5)

    def test_cost(self, rows: list[dict[str, Any]]) -> None:
        half = rows[1]
        assert (half["bytes_stored"], half["bytes_stored_fraction"]) == (40, 0.4)
        assert half["ms_per_token"] == (2 * 2 + 2 * 5) / 4
        assert half["rows_read_fraction"] == pytest.approx(0.5)
        assert half["new_tokens"] == 3

    def test_answers_of_one_token_have_no_time_per_token(self, runtime: Runtime) -> None:
        setting = Setting("full")
        asked = Asked({setting: {0: _answer(0, setting, "a", (1,))}})
        (row,) = report(runtime, Questions("hand", (Question("", Path(), "?", ("a",)),), ()), asked, "anls")["results"]
        assert (row["ms_per_token"], row["rows_read_fraction"]) == (None, None)


QUESTIONS = (("red", "colour"), ("12 km", "number"))


class TestDivergence:
    """Against transformers: the model itself for full attention, the masked oracle for a method."""

    def _prepare(self, runtime: Runtime, **options: Any) -> Any:
        return runtime.prepare([random_image(3, (120, 80))], "What is it?", Options(max_new_tokens=8, **options))

    def test_full_attention_expects_what_transformers_does(self, runtime: Runtime, model: str) -> None:
        request = self._prepare(runtime, method="full")
        token_ids = [17, 300, 25, 41, 99]
        divergence = Divergence(runtime, Path(model))
        own = divergence.log_probabilities(request, divergence.encode(request), token_ids)
        reference = LlavaForConditionalGeneration.from_pretrained(model).eval()
        prompt = request.prompt
        with torch.no_grad():
            ids = torch.tensor([[*prompt.token_ids, *token_ids]])
            logits = reference(input_ids=ids, pixel_values=torch.tensor(prompt.pixel_values)).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(own, expected, atol=2e-4, rtol=0)

    def test_a_method_expects_what_its_oracle_does(self, runtime: Runtime, model: str) -> None:
        request = self._prepare(runtime, method="fastv", parameters={"layer": 1, "drop": 80})
        prompt = request.prompt
        pixels = torch.tensor(prompt.pixel_values).double()
        steps = fastv(Case(load_model(Path(model)), list(prompt.token_ids), pixels, 8), layer=1, drop=80)
        divergence = Divergence(runtime, Path(model))
        own = divergence.log_probabilities(request, divergence.encode(request), [step.token for step in steps])
        expected = torch.stack([step.logits for step in steps]).log_softmax(-1)
        torch.testing.assert_close(own.double(), expected, atol=2e-4, rtol=0)

    def test_kl_is_its_definition(self) -> None:
        full, other = (torch.randn(5, 11).log_softmax(-1) for _ in range(2))
        p, q = full.double().exp().numpy(), other.double().exp().numpy()
        assert kl_per_token(full, other) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)

    def test_full_is_at_no_distance_and_less_memory_at_some(self, runtime: Runtime, model: str) -> None:
        full = self._prepare(runtime, method="full")
        requests = {
            Setting("h2o", share): self._prepare(runtime, method="h2o", parameters={"budget": 100 * share, "grow": 1})
            for share in (1.0, 0.2)
        }
        whole, little = Divergence(runtime, Path(model)).from_full(full, [5, 6, 7], requests).values()
        assert whole < 1e-9 < 1e-4 < little


def test_a_question_is_asked_with_its_data_sets_instruction() -> None:
    question = Question("", Path(), "How many?", ("2",))
    plain = Questions("x", (question,), ())
    assert plain.prompt(question) == "How many?"
    assert replace(plain, instruction="Use one word.").prompt(question) == "How many?\nUse one word."


@given(st.integers(0, 10**6), st.integers(10, 60))
def test_ppci_and_concentration_are_their_definitions(seed: int, count: int) -> None:
    scores = np.random.default_rng(seed).random((2, count))
    best = [set(sorted(range(count), key=lambda i, row=row: (-row[i], i))[: count // 10]) for row in scores]
    assert ppci(scores[0], scores[1], 0.1) == pytest.approx(len(best[0] & best[1]) / (count // 10))
    needed = next(n for n in range(1, count + 1) if sum(sorted(scores[0])[-n:]) >= 0.8 * scores[0].sum())
    assert share_that_holds(scores[0], 0.8) == needed / count
