"""stdout that ends before the command does, and Ctrl-C from the first moments on: one line or none, and the exit code
that says so."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.equipment.processes import hear_interrupts

AVL_EDGE = [sys.executable, "-c", "from avl_edge.__main__ import main; main()"]
COMMANDS = {
    "methods": ["methods"],
    "models": ["models", "--json"],
    "plan": ["plan", "--model", "demo", "--device", "cpu-x86"],
    "eval": ["eval", "--questions", "2", "--methods", "full", "--max-new-tokens", "2"],
    "eval --json": ["eval", "--questions", "2", "--methods", "full", "--max-new-tokens", "2", "--json"],
    "run": ["run", "--prompt", "How far?", "--max-new-tokens", "3"],
}
full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@full_disk
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line(command: str) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*AVL_EDGE, *COMMANDS[command]], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr == "avl-edge: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_leaves_is_nobodys_fault(command: str) -> None:
    process = subprocess.Popen([*AVL_EDGE, *COMMANDS[command]], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, b"")


def test_a_closed_stdout_is_one_line() -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *AVL_EDGE, "methods"]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "avl-edge: stdout is closed: send it somewhere, such as > /dev/null\n"


@pytest.mark.parametrize("target", ["/proc/self/here.json", "/dev/null/here.json"])
def test_a_target_that_takes_no_files_is_one_line(target: str) -> None:
    ended = subprocess.run([*AVL_EDGE, *COMMANDS["eval"], "--out", target], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "cannot be written" in ended.stderr


@pytest.mark.parametrize("seconds", [0, 0.05, 0.2, 0.5, 1.0])
def test_an_interrupt_while_a_command_is_imported(seconds: float) -> None:
    program = 'import sys; from avl_edge.__main__ import main; print("begun", file=sys.stderr, flush=True); main()'
    command = [sys.executable, "-c", program, "run", "--prompt", "How far?", "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "begun\n"
    time.sleep(seconds + 0.02)  # until the first line of `main`
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
