"""`avl-edge plan` as a person meets it: its table, its JSON, its refusals."""

from __future__ import annotations

import json

import pytest

from avl_edge import Options
from avl_edge.cli import run_app

AVL = ["--method", "avl", "--secondary", "45", "--core", "30", "--refresh", "3", "--prefill-keep", "90"]
PROMPT = ["--image-tokens", "576", "--prompt-tokens", "71", "--system-tokens", "35"]
TOKENS = [*PROMPT, "--max-new-tokens", "1"]


def _run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = run_app(["plan", *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "llava-1.5-7b", "--device", "agx-orin-64", "--power", "30W", *TOKENS, *AVL]
    code, out, err = _run(capsys, *options, "--text-keep", "50", "--json")
    document = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert set(document["kv"]) == {"bytes_full", "bytes_stored", "bytes_peak", "layers"}
    assert document["kv"]["bytes_full"] == 647 * 524_288
    # 35 text rows that are never evicted, 259 of 576 image rows, the floor of 20 text rows
    assert document["kv"]["bytes_stored"] == (35 + 259 + 20) * 524_288
    assert document["kv"]["layers"] == [{"text": 55, "core": 172, "secondary": 87, "freed": 333}] * 32
    assert (document["power_mode"], document["time"]["basis"]) == ("MODE_30W", "derived")
    code, out, err = _run(capsys, *options)
    assert (code, err) == (0, "")
    assert "layers 0-31" in out
    assert "172 core" in out


def test_counts_of_tokens_change_no_default(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "llava-1.5-7b", "--device", "agx-orin-64", "--json"]
    default = json.loads(_run(capsys, *options, *PROMPT)[1])["kv"]
    assert (
        default == json.loads(_run(capsys, *options, *PROMPT, "--max-new-tokens", str(Options.max_new_tokens))[1])["kv"]
    )
    assert default["bytes_full"] == (647 + Options.max_new_tokens - 1) * 524_288


def test_the_command_of_the_handbook(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "agx-orin-64", "--power", "30W", "--images", "3", "--image-size", "1280x960"]
    code, out, _ = _run(
        capsys, "--model", "llava-1.5-7b", *options, "--max-new-tokens", "256", "--streams", "4", "--json"
    )
    document = json.loads(out)
    assert code == 0
    assert document["prompt"] == {"prefix": 35, "images": 1728, "suffix": 36, "length": 1799}
    assert document["kv"]["bytes_full"] == (1799 + 255) * 524_288
    assert document["memory"]["kv_bytes"] == 4 * document["kv"]["bytes_peak"]


@pytest.mark.parametrize(("tokens", "before"), [("71", 35), ("100", 35), ("20", 10), ("1", 0)])
def test_some_text_stands_after_the_image(capsys: pytest.CaptureFixture[str], tokens: str, before: int) -> None:
    options = ["--model", "llava-1.5-7b", "--device", "agx-orin-64", "--prompt-tokens", tokens, "--json"]
    prompt = json.loads(_run(capsys, *options)[1])["prompt"]
    assert (prompt["prefix"], prompt["suffix"]) == (before, int(tokens) - before)


def test_a_refusal_has_its_exit_code_and_its_ways(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "llava-1.5-13b", "--device", "agx-orin-32", "--max-memory", "20GB"]
    code, out, err = _run(capsys, *options)
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    assert "--weights int8" in err
    code, out, _ = _run(capsys, *options, "--json")
    document = json.loads(out)
    assert (code, document["fits"], len(document["alternatives"])) == (3, False, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "llava-2"], "llava-1.5-7b"),
        (["--model", "llava-1.5-7b", "--device", "toaster"], "agx-orin-64"),
        (["--model", "llava-1.5-7b", "--device", "agx-orin-64", "--power", "99W"], "maxn"),
        (["--model", "llava-1.5-7b", "--device", "missing.yaml"], "no profile"),
        (["--model", "llava-1.5-7b", "--image-size", "big"], "1280x960"),
        (["--model", "llava-1.5-7b", "--max-memory", "lots"], "160MB"),
        (["--model", "llava-1.5-7b", "--method", "best"], "choose one of"),
        (["--model", "llava-1.5-7b", "--weights", "int3"], "int4"),
        (["--model", "llava-1.5-7b", "--kv-format", "int9"], "not 'int9'"),
        (["--model", "llava-1.5-7b", "--text-format", "lowrank:8"], "text rows cannot be low-rank"),
        (["--model", "llava-1.5-7b", "--core-format", "lowrank:9999"], "the core format lowrank:9999 asks for more"),
        (["--model", "llava-1.5-7b", "--method", "coarse", "--core-format", "int8"], "the same format"),
        (["--model", "llava-1.6-vicuna-7b", "--images", "3"], "context"),
        (["--model", "llava-1.5-7b", "--set", "core"], "NAME=VALUE"),
    ],
)
def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    code, out, err = _run(capsys, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("avl-edge: ")
    assert message in err
