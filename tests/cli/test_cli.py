"""The command line as a person meets it: help, faults, interrupts, pipes. Real files, real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from avl_edge.cli import run_app
from tests.equipment.command_line import COMMAND, PROMPT, Outcome
from tests.equipment.machines import TREES
from tests.equipment.processes import hear_interrupts


def test_faults_of_ours_have_their_own_code_and_no_trace(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def fail(*_: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("avl_edge.backends.cpu.target.VisionLanguageModel", fail)
    outcome = run()
    assert outcome.code == 1
    assert (
        outcome.err == "avl-edge: internal error: RuntimeError: disk on fire (run again with --debug for the trace)\n"
    )
    _traced(run("--debug"), 1, "RuntimeError: disk on fire")


def _traced(outcome: Outcome, code: int, last: str) -> None:
    """The exit code as without --debug; on stderr a trace that ends with the error, on stdout nothing."""
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith("Traceback (most recent call last):\n")
    assert last in outcome.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "code", "last"),
    [
        (["--kv-budget", "lots"], 2, "BadInput: cannot read 'lots' as a size"),
        (["--image", "nowhere.png"], 2, "BadImage: "),
        (["--model", "nowhere"], 2, "BadModel: there is no model 'nowhere'"),
        (["--frobnicate"], 2, "No such option: --frobnicate"),
        (["--kv-budget", "10kB"], 3, "TooLarge: "),
    ],
)
def test_debug_shows_the_trace_and_keeps_the_exit_code(run, options: list[str], code: int, last: str) -> None:  # type: ignore[no-untyped-def]
    assert run(*options).code == code
    _traced(run(*options, "--debug"), code, last)


def test_debug_may_stand_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["--debug", "plan", "--model", "nope"]) == 2
    captured = capsys.readouterr()
    _traced(Outcome(2, captured.out, captured.err), 2, "BadModel: there is no model 'nope'")


def test_doctor_reads_a_recorded_tree(capsys: pytest.CaptureFixture[str]) -> None:
    for tree in sorted(path for path in TREES.iterdir() if path.is_dir()):
        code = run_app(["doctor", "--root", str(tree), "--json"])
        document = json.loads(capsys.readouterr().out)
        assert code == (0 if document["ok"] else 1)
        assert run_app(["doctor", "--root", str(tree)]) == code
        assert len(capsys.readouterr().out.splitlines()) > len(document["checks"])
    assert run_app(["doctor", "--root", "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("avl-edge: ")


def test_help_and_version(run, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    assert run_app(["--version"]) == 0
    assert re.fullmatch(r"avl-edge \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert run_app(["run", "--help"]) == 0
    assert "--kv-budget" in capsys.readouterr().out


def test_a_picture_from_stdin(model: str, picture: str) -> None:
    options = ["--model", model, "--prompt", PROMPT, "--max-new-tokens", "8"]
    piped = subprocess.run(
        [*COMMAND, *options, "--image", "-"], input=Path(picture).read_bytes(), capture_output=True, timeout=120
    )
    direct = subprocess.run([*COMMAND, *options, "--image", picture], capture_output=True, timeout=120)
    assert piped.returncode == direct.returncode == 0
    assert piped.stdout == direct.stdout != b"\n"
    assert direct.stderr == b"avl-edge: the answer was cut after 8 tokens: raise --max-new-tokens\n"


def test_interrupt_stops_with_130_and_no_trace(model: str, picture: str) -> None:
    options = ["--model", model, "--image", picture, "--prompt", PROMPT, "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        [*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_interrupts
    )
    assert process.stdout
    os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert time.monotonic() - start < 30


def test_a_reader_that_leaves_is_no_fault(model: str, picture: str) -> None:
    """``avl-edge run ... | head -c 1``: the pipe breaks, which ends the run quietly."""
    options = ["--model", model, "--image", picture, "--prompt", PROMPT, "--max-new-tokens", "300"]
    process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in errors
    assert b"internal error" not in errors


@pytest.mark.parametrize("as_json", [False, True])
def test_a_terminal_that_cannot_show_the_answer_is_no_fault(model: str, picture: str, as_json: bool) -> None:
    """The random model says bytes of every kind; what ASCII lacks is replaced, or escaped in JSON."""
    options = ["--model", model, "--image", picture, "--prompt", PROMPT, *(["--json"] if as_json else [])]
    plain = subprocess.run([*COMMAND, *options], capture_output=True, check=True, env=_encoding("utf-8"))
    ascii_ = subprocess.run([*COMMAND, *options], capture_output=True, check=True, env=_encoding("ascii"))
    text = plain.stdout.decode()
    if as_json:
        assert _without_times(text) == _without_times(ascii_.stdout.decode("ascii"))
    else:
        assert not text.isascii()
        assert text.encode("ascii", "replace") == ascii_.stdout


def _encoding(name: str) -> dict[str, str]:
    return {**os.environ, "PYTHONIOENCODING": name}


def _without_times(document: str) -> dict[str, object]:
    """Nor with what the process held."""
    return {name: value for name, value in json.loads(document).items() if name not in ("timings", "memory")}
