"""Help, the list of commands and completion, as a terminal of 80 columns shows them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from avl_edge import Formats
from avl_edge.cli import run_app
from avl_edge.cli.commands import COMMANDS
from avl_edge.kv.methods.notation import parse
from avl_edge.measure.evaluate import settings_of
from tests import ROOT

MODULE = [sys.executable, "-m", "avl_edge"]
LINES = [[], *([name] for name in COMMANDS), ["profile", "show"], ["bench", "attention"]]


@pytest.fixture(autouse=True)
def _columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def _help(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert run_app([*command, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", LINES, ids=" ".join)
def test_help_fits_its_terminal(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    text = _help(capsys, *command)
    assert text.startswith(" ".join(["Usage: avl-edge", *command, "["]))
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()


def test_every_command_has_one_line_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    listed = _help(capsys).split("\nCommands:\n")[1]
    expected = [(name, lazy.help) for name, lazy in COMMANDS.items()]
    assert re.findall(r"^  (\S+) +(.+)$", listed, re.MULTILINE) == expected
    assert len(listed.splitlines()) == len(COMMANDS)


@pytest.mark.parametrize("command", [[], ["run"], ["profile", "show"]])
def test_the_short_form_of_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    expected = _help(capsys, *command)
    assert run_app([*command, "-h"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("command", [[], ["bench"]])
def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    expected = _help(capsys, *command)
    assert run_app(command) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", expected)


def test_a_command_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["docto"]) == 2
    assert capsys.readouterr().err == "avl-edge: No such command 'docto'. Did you mean 'doctor'? (see --help)\n"


def test_options_of_run_stand_under_headings(capsys: pytest.CaptureFixture[str]) -> None:
    parts = re.split(r"^(\S.*):\n", _help(capsys, "run"), flags=re.MULTILINE)
    options = {
        heading: re.findall(r"^  (?:-h, )?--([\w-]+)", text, re.MULTILINE)
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    assert list(options) == ["Options", "Sampling options", "Method options", "Memory options", "Output options"]
    assert {"prompt", "image", "model", "device", "threads", "debug", "help"} <= set(options["Options"])
    assert {"temperature", "top-p", "logit-bias", "seed", "stop"} <= set(options["Sampling options"])
    assert {"method", "preset", "secondary", "set"} <= set(options["Method options"])
    assert {"kv-budget", "reserve", "kv-format"} <= set(options["Memory options"])
    assert options["Output options"] == ["explain", "stats", "logprobs", "json"]


def test_eval_says_how_a_format_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys, "eval")
    example = re.search(r"^  +avl-edge eval --methods (\S+) --kv-fraction (\S+)$", text, re.MULTILINE)
    assert example
    assert "distinct:format=int4" in example.group(1)
    methods, fractions = example.group(1).split(","), [float(part) for part in example.group(2).split(",")]
    assert {str(setting) for setting in settings_of(methods, fractions)} >= {"distinct:format=int4 at 50 %"}
    assert parse("distinct:format=int4").formats == Formats("int4", "int4", "int4")


def test_the_package_can_be_run_as_a_module() -> None:
    done = subprocess.run([*MODULE, "doctor", "--frob"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"avl-edge: No such option: --frob .*\(see --help\)\n", done.stderr)
    done = subprocess.run([*MODULE, "doctor", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("Usage: avl-edge doctor [OPTIONS]\n")


def _complete(words: str) -> list[str]:
    """What a shell would offer for the last of ``words``, from a process in which torch cannot be imported."""
    program = "import sys; sys.modules['torch'] = None; from avl_edge.cli import main; main()"
    environment = {
        **os.environ,
        "_AVL_EDGE_COMPLETE": "complete_bash",
        "COMP_WORDS": f"avl-edge {words}",
        "COMP_CWORD": str(len(words.split(" "))),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_shells_complete_commands_and_their_options() -> None:
    assert set(_complete("")) == set(COMMANDS)
    assert _complete("doc") == ["doctor"]
    assert _complete("doctor --r") == ["--root"]
    assert "--image-size" in _complete("plan --i")


def test_the_script_for_the_shell() -> None:
    """The shell that asks is found by its process, so that this one may not be replaced by the command."""
    command = f"'{sys.executable}' -m avl_edge --show-completion bash; exit $?"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "_AVL_EDGE_COMPLETE=complete_bash" in done.stdout
    assert "complete -o default -F _avl_edge_completion avl-edge" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, timeout=60, check=False).returncode == 0
