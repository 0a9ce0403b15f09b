"""The programs and commands that the README and the pages of docs/ show run as they show them, on the shipped model."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avl_edge.cli import run_app
from tests import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCES = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

NOT_RUN = {
    "make": "installs packages, or runs every test",
    "source .venv/bin/activate": "the environment that `make demo` makes",
    "pip install": "installs packages",
    "docker": "needs docker, and builds for a Jetson",
    "sudo": "writes to /opt and /etc",
    "systemctl": "needs what was installed there",
    "avl-edge profile": "times this machine for minutes; tests/measure/test_profile_measured.py does it shorter",
    "avl-edge serve": "answers until it is ended; tests/server does it",
    "avl-edge bench": "times this machine; tests/measure/test_bench_attention.py does it shorter",
    "avl-edge run --device cuda": "needs a GPU",
    "python -m tools.gpu.check": "needs a GPU",
    "avl-edge run --model PACKAGE": "needs TensorRT",
    "python -m tools.demo_model.train": "trains for hours",
    "python -m tools.real_decoder": "needs a decoder's GGUF file; tests/tools/test_real_decoder.py makes a small one",
    "avl-edge eval --model real-decoder": "needs that checkpoint; tests/cli has it with a small one",
    "ln -sfn": "the files that a measurement names",
    "python examples": "the tests below run these programs",
    "python -m tools.docs": "writes into this repository; tests/tools/test_docs.py holds the pages to it",
}
"""How a line begins that is not run here, and why."""

SHORTER = {"avl-edge eval": "--questions 2"}
"""What is added to a line so that it takes seconds."""

STANDS_IN = {"llava-1.5-7b-hf": ROOT / "avl_edge" / "demo"}
"""What a page expects the reader to have: any LLaVA-1.5 checkpoint will do here."""


def _python(*arguments: str) -> str:
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def _blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCES.findall(page.read_text()) if kind == language]


def _lines(page: Path) -> list[str]:
    """The commands that a page shows, each on one line."""
    return "".join(_blocks(page, "sh")).replace("\\\n", " ").splitlines()


def _is_run(line: str) -> bool:
    return not line.startswith(tuple(NOT_RUN))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is like the repository, and may be written into."""
    for name in ("examples", "engines"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, path in STANDS_IN.items():
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def _avl_edge(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line as a shell would: ``avl-edge ...``, with a file piped into it or not."""
    piped = re.match(r"cat (\S+) \| ", line)
    if piped:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(piped[1]).read_bytes())))
    program, *arguments = shlex.split(line[piped.end() if piped else 0 :], comments=True)
    assert program == "avl-edge", f"say how to run it here, or why not: {line}"
    assert run_app(arguments) == 0, line


def test_ask() -> None:
    assert _python("examples/ask.py", "examples/cockpit.png", "What is the speed?").strip()


def test_together() -> None:
    questions = ["What is the speed?", "Which gear is it in?", "Is it freezing?"]
    lines = _python("examples/together.py", "examples/cockpit.png", *questions).splitlines()
    assert len(lines) == 3
    for question, line in zip(questions, lines, strict=True):
        assert line.startswith(question)
        counts = re.search(r"at most (\d+) of (\d+) bytes", line)
        assert counts
        assert int(counts[1]) <= 3_000_000


@pytest.mark.parametrize("name", ["service", "threads"])
def test_many_clients(name: str) -> None:
    questions = ["What is the speed?", "Which gear is it in?", "Is it freezing?"]
    lines = _python(f"examples/{name}.py", "examples/cockpit.png", *questions).splitlines()
    assert {line.partition("?")[0] + "?" for line in lines[:3]} == set(questions)
    assert all(re.fullmatch(r".+\? .+  \(\d+ bytes at most\)", line) for line in lines[:3])
    assert lines[3:] == (["the client that left: cancelled"] if name == "service" else [])


PROGRAMS = [
    pytest.param(body, id=f"{page.name}-{at}") for page in PAGES for at, body in enumerate(_blocks(page, "python"))
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_of_the_pages(program: str) -> None:
    assert _python("-c", program).strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("checkout")
def test_commands_of_the_pages(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order, in one folder: each ends well and says something."""
    for line in filter(_is_run, _lines(page)):
        more = [options for start, options in SHORTER.items() if line.startswith(start)]
        _avl_edge(" ".join([line, *more]), monkeypatch)
        assert capsys.readouterr().out.strip(), line


def test_every_command_is_in_a_block_that_is_read() -> None:
    """Programs are fenced as sh, python or console; and no exception is left that no page needs."""
    text = "".join(page.read_text() for page in PAGES)
    assert {kind for kind, _ in FENCES.findall(text)} == {"sh", "python", "console"}
    assert not re.search(r"^ {4}", FENCES.sub("", text), re.MULTILINE)
    lines = [line for page in PAGES for line in _lines(page)]
    assert all(any(line.startswith(start) for line in lines) for start in (*NOT_RUN, *SHORTER))


@pytest.mark.usefixtures("checkout")
def test_several_questions_in_the_readme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command answers the questions that the README shows, in their order, a line for each, in the memory that it
    says."""
    (block,) = _blocks(README, "console")
    command, *shown = block.replace("\\\n", "").removeprefix("$ ").splitlines()
    _avl_edge(f"{command} --stats", monkeypatch)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == len(shown) == 6
    assert lines[::2] == shown[::2] == [word for word in shlex.split(command) if word[0].isupper()]
    said = re.search(r"held once, (\S+ MB)\nhere\..*, (\S+) to (\S+) MB;", README.read_text())
    assert said
    assert f", {said[1]} of rows held once" in printed.err
    stored = re.findall(r"KV stored / .*?  (\S+) (kB|MB) /", printed.err)
    sizes = [float(size) / {"kB": 1000, "MB": 1}[unit] for size, unit in stored]
    assert len(sizes) == 3
    assert (f"{min(sizes):.1f}", f"{max(sizes):.1f}") == (said[2], said[3])


@pytest.mark.parametrize("name", ["cockpit.png", "road.jpg", "screen.png"])
def test_the_sample_pictures_are_those_of_the_generator(name: str, tmp_path: Path) -> None:
    _python("-m", "tools.demo_model.scenes", "--examples", "--folder", str(tmp_path))
    drawn, kept = (np.asarray(Image.open(folder / name), float) for folder in (tmp_path, ROOT / "examples"))
    assert drawn.shape == kept.shape == (336, 336, 3)
    assert np.abs(drawn - kept).mean() < 1  # another JPEG library or another version of the fonts' renderer
