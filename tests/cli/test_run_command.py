"""`avl-edge run`: the answer as text and JSON, settings, formats and budgets."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from avl_edge import Options, Runtime
from tests.equipment.command_line import PROMPT, Outcome


def test_json_is_one_document_and_nothing_else(run) -> None:  # type: ignore[no-untyped-def]
    outcome = run("--json", "--method", "avl", "--max-new-tokens", "30")
    assert (outcome.code, outcome.err) == (0, "")
    document = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert set(document) >= {
        "text",
        "token_ids",
        "finish_reason",
        "model",
        "backend",
        "method",
        "usage",
        "timings",
        "kv",
    }
    assert set(document["usage"]) == {"prompt_tokens", "image_tokens", "completion_tokens"}
    assert set(document["timings"]) == {
        "load_ms",
        "encode_ms",
        "prefill_ms",
        "ttft_ms",
        "decode_ms_per_token",
        "tokens_per_s",
    }
    kv = document["kv"]
    assert set(kv) >= {"bytes_full", "bytes_stored", "bytes_peak", "rows_read_fraction", "refreshes", "layers"}
    assert len(kv["layers"]) == 5
    assert set(kv["layers"][0]) == {"text", "core", "secondary", "freed"}
    assert 0 < kv["bytes_stored"] <= kv["bytes_peak"] < kv["bytes_full"]
    assert document["usage"]["completion_tokens"] == len(document["token_ids"]) == 30


def test_any_parameter_can_be_set(run) -> None:  # type: ignore[no-untyped-def]
    options = ["--json", "--method", "avl", "--max-new-tokens", "3", "--core", "10"]
    settings = json.loads(run(*options, "--set", "text-floor=5", "--set", "heavy=12.5").out)["settings"]
    assert (settings["text_floor"], settings["heavy"], settings["core"]) == (5, 12.5, 10)


@pytest.mark.parametrize(
    ("options", "formats"),
    [
        ([], ("exact", "exact", "exact")),
        (["--kv-format", "int8"], ("int8", "int8", "int8")),
        (["--kv-format", "int4", "--text-format", "exact", "--core-format", "int8"], ("exact", "int8", "int4")),
        (["--method", "avl", "--secondary-format", "int4"], ("exact", "exact", "int4")),
        (["--method", "coarse", "--kv-format", "int8", "--set", "mass=90"], ("int8", "int8", "int8")),
        (["--kv-format", "lowrank:8"], ("exact", "lowrank:8", "lowrank:8")),
    ],
)
def test_formats_of_rows(run, options: list[str], formats: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    outcome = run("--json", "--max-new-tokens", "8", *options)
    document = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert document["formats"] == dict(zip(("text", "core", "secondary"), formats, strict=True))
    kv = document["kv"]
    assert (kv["bytes_stored"] < kv["bytes_full"]) == (kv["bytes_read_fraction"] < 1) == bool(options)
    table = run("--stats", "--max-new-tokens", "3", *options).err
    spoken = ", ".join(f"{tier} {name}" for tier, name in document["formats"].items() if name != "exact")
    assert f"formats                  {spoken or 'exact'}" in table


def test_text_streams_the_same_answer(run) -> None:  # type: ignore[no-untyped-def]
    document = json.loads(run("--json", "--max-new-tokens", "20").out)
    outcome = run("--max-new-tokens", "20")
    assert outcome.out == document["text"] + "\n"
    assert (document["finish_reason"], outcome.err) == ("length", _cut(20))


def _cut(tokens: int) -> str:
    return f"avl-edge: the answer was cut after {tokens} token{'s' * (tokens > 1)}: raise --max-new-tokens\n"


def test_an_answer_that_is_cut_says_so(run) -> None:  # type: ignore[no-untyped-def]
    assert run("--max-new-tokens", "1").err == _cut(1)
    stopped = run("--max-new-tokens", "20", "--stop", json.loads(run("--json", "--max-new-tokens", "3").out)["text"])
    assert (stopped.code, stopped.err) == (0, "")
    tables = [run("--max-new-tokens", "5", "--stats", *more).err for more in ([], ["--json"])]
    assert all("cut at the longest answer" in table for table in tables)
    assert [_cut(5) in table for table in tables] == [True, False]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_question_from_stdin_or_a_file(
    run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: bytes,  # type: ignore[no-untyped-def]
) -> None:
    expected = run("--json", "--max-new-tokens", "5")
    (tmp_path / "question.txt").write_bytes(PROMPT.encode() + end)
    assert _same(run("--json", "--max-new-tokens", "5", prompt=f"@{tmp_path / 'question.txt'}"), expected)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode() + end)))
    assert _same(run("--json", "--max-new-tokens", "5", prompt="-"), expected)


def test_two_of_its_signs_begin_no_file(run, model: str, picture: str) -> None:  # type: ignore[no-untyped-def]
    asked = json.loads(run("--json", "--max-new-tokens", "5", prompt="@@home").out)["token_ids"]
    options = Options(max_new_tokens=5)
    assert tuple(asked) == Runtime.load(model).generate([Path(picture)], "@home", options).result().token_ids


def _same(one: Outcome, other: Outcome) -> bool:
    first, second = json.loads(one.out), json.loads(other.out)
    return one.code == other.code == 0 and first["token_ids"] == second["token_ids"] != []


def test_questions_that_cannot_be_read(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "latin").write_bytes("Größe?".encode("latin-1"))
    for prompt, message in (
        (f"@{tmp_path / 'none'}", "cannot be read (No such file or directory)"),
        (f"@{tmp_path}", "cannot be read (Is a directory)"),
        (f"@{tmp_path / 'latin'}", "is no text in UTF-8"),
        ("@" + "x" * 5000, "cannot be read (File name too long)"),
    ):
        outcome = run(prompt=prompt)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err
        assert outcome.err.count("\n") == 1
    outcome = run("--prompt", "-", image="-")
    assert (outcome.code, outcome.err) == (
        2,
        "avl-edge: only one --image or --prompt can be read from stdin: give the others as files\n",
    )


def test_sampling_options_reach_the_request(run, model: str, picture: str) -> None:  # type: ignore[no-untyped-def]
    """The answers are those of the same options in Python, and each option changes them."""
    runtime, base = Runtime.load(model), ["--temperature", "1.5", "--seed", "4"]
    choices: list[tuple[list[str], dict[str, Any]]] = [
        (["--top-k", "2"], {"top_k": 2}),
        (["--top-p", "0.3"], {"top_p": 0.3}),
        (["--min-p", "0.5"], {"min_p": 0.5}),
        (["--repetition-penalty", "0.2"], {"repetition_penalty": 0.2}),
        (["--frequency-penalty", "-1.5"], {"frequency_penalty": -1.5}),
        (["--presence-penalty", "-2"], {"presence_penalty": -2.0}),
        (["--logit-bias", "40=7", "--logit-bias", "41=6.5"], {"logit_bias": {40: 7.0, 41: 6.5}}),
        (["--seed", "5"], {"seed": 5}),
        (["--temperature", "0"], {"temperature": 0.0}),
        ([], {}),
    ]
    answers = []
    for options, meant in choices:
        document = json.loads(run("--json", "--max-new-tokens", "12", *base, *options).out)
        expected = Options(**{"temperature": 1.5, "seed": 4, "max_new_tokens": 12} | meant)
        result = runtime.generate([Path(picture)], PROMPT, expected).result()
        assert (tuple(document["token_ids"]), document["seed"]) == (result.token_ids, result.seed)
        answers.append(result.token_ids)
    assert len(set(answers)) == len(choices)


def test_seeds_differ_from_run_to_run_and_are_told(run) -> None:  # type: ignore[no-untyped-def]
    options = ["--temperature", "2", "--max-new-tokens", "12"]
    one, two = (json.loads(run("--json", *options).out) for _ in range(2))
    assert one["seed"] != two["seed"]
    assert one["token_ids"] != two["token_ids"]
    again = run("--stats", *options, "--seed", str(one["seed"]))
    assert again.out == one["text"] + "\n"
    assert re.search(rf"^seed +{one['seed']} *$", again.err, re.MULTILINE)


def test_stop_strings_and_logprobs_in_the_document(run) -> None:  # type: ignore[no-untyped-def]
    text = json.loads(run("--json", "--max-new-tokens", "20").out)["text"]
    stop = text[5:7]
    outcome = run("--json", "--max-new-tokens", "20", "--stop", "never", "--stop", stop, "--logprobs", "3")
    document = json.loads(outcome.out)
    assert (document["text"], document["stop_string"]) == (text[: text.index(stop)], stop)
    assert document["finish_reason"] == "stop"
    assert [each["token_id"] for each in document["logprobs"]] == document["token_ids"]
    for each in document["logprobs"]:
        assert each["top"][0] == {"token_id": each["token_id"], "logprob": each["logprob"]}
        assert len(each["top"]) == 3
        assert 0 >= each["top"][0]["logprob"] >= each["top"][1]["logprob"] >= each["top"][2]["logprob"]


def test_stats_go_to_stderr(run) -> None:  # type: ignore[no-untyped-def]
    outcome = run("--stats", "--max-new-tokens", "5")
    assert outcome.code == 0
    assert "KV stored / peak / full" in outcome.err
    assert "KV" not in outcome.out


def test_a_budget_picks_and_says_so(run) -> None:  # type: ignore[no-untyped-def]
    full = json.loads(run("--json", "--max-new-tokens", "40").out)["kv"]["bytes_peak"]
    budget = int(0.7 * full)
    outcome = run("--json", "--max-new-tokens", "40", "--kv-budget", str(budget), "--method", "avl")
    document = json.loads(outcome.out)
    assert document["method"] == "avl"
    assert re.match(
        r"avl-edge: avl P \d+ S \d+ C \d+ K 3 T \d+ holds at most [\d.]+ kB of the [\d.]+ kB budget", outcome.err
    )
    assert document["kv"]["bytes_peak"] <= budget == document["kv"]["bytes_budget"]
    assert document["settings"]["secondary"] < 100
    assert set(document["formats"].values()) == {"exact"}


def test_a_budget_without_a_method_is_kept_and_what_was_picked_is_said(run) -> None:  # type: ignore[no-untyped-def]
    full = json.loads(run("--json", "--max-new-tokens", "40").out)["kv"]["bytes_peak"]
    for share in (0.9, 0.5, 0.2):
        outcome = run("--json", "--max-new-tokens", "40", "--kv-budget", str(int(share * full)))
        document = json.loads(outcome.out)
        assert document["kv"]["bytes_peak"] <= share * full
        packed = [f"{tier} {name}" for tier, name in document["formats"].items() if name != "exact"]
        assert packed
        assert re.match(rf"avl-edge: {document['method']}[ ,]", outcome.err)
        assert ", ".join(packed) in outcome.err
    outcome = run("--json", "--max-new-tokens", "40", "--kv-budget", str(full))
    assert outcome.err.startswith("avl-edge: full holds at most ")
    assert set(json.loads(outcome.out)["formats"].values()) == {"exact"}


def test_what_does_not_fit_is_refused_with_the_smallest_that_does(run) -> None:  # type: ignore[no-untyped-def]
    outcome = run("--kv-budget", "10kB", "--json")
    assert (outcome.code, outcome.out) == (3, "")
    smallest = re.search(r"smallest that would do is .*? \((\d+) bytes\)", outcome.err)
    assert smallest
    assert run("--kv-budget", smallest.group(1), "--json").code == 0
    assert run("--kv-budget", str(int(smallest.group(1)) - 1), "--json").code == 3
    assert run("--kv-budget", smallest.group(1), "--method", "full").code == 3


def test_one_line_says_where_transparency_mattered(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "sign.png"
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(path)
    options = ["--max-new-tokens", "3"]
    outcome = run(*options, image=str(path))
    note = f"'{path}' is transparent in 100 % of its pixels, which is shown in the colours behind it"
    assert outcome.err.startswith(f"avl-edge: {note}: transparency white or black puts it on a background\n")
    assert json.loads(run(*options, "--json", image=str(path)).out)["notes"][0].startswith(note)
    assert "transparent" not in run(*options, "--transparency", "white", image=str(path)).err
    assert "drop, white, black, not 'grey'" in run(*options, "--transparency", "grey", image=str(path)).err
