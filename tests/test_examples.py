"""The programs that the README shows run as it shows them, on the shipped model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import ROOT

README = (ROOT / "README.md").read_text()


def _python(*arguments: str) -> str:
    process = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


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


def test_the_readme_in_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        assert "bytes_peak" in _python("-c", block)


def test_several_questions_in_the_readme() -> None:
    """The command answers the questions that the README shows, in their order, a line for each."""
    block = re.search(r"^    \$ \.venv/bin/(avl-edge run (?:.*\\\n)*.*)\n((?:    .*\n)+)", README, re.MULTILINE)
    assert block
    command, shown = shlex.split(block[1].replace("\\\n", "")), textwrap.dedent(block[2]).splitlines()
    lines = _python("-c", "from avl_edge.cli import main; main()", *command[1:]).splitlines()
    assert len(lines) == len(shown) == 6
    assert lines[::2] == shown[::2] == [word for word in command if word[0].isupper()]


@pytest.mark.parametrize("name", ["cockpit.png", "road.jpg", "screen.png"])
def test_the_sample_pictures_are_those_of_the_generator(name: str, tmp_path: Path) -> None:
    _python("-m", "tools.demo_model.scenes", "--examples", "--folder", str(tmp_path))
    drawn, kept = (np.asarray(Image.open(folder / name), float) for folder in (tmp_path, ROOT / "examples"))
    assert drawn.shape == kept.shape == (336, 336, 3)
    assert np.abs(drawn - kept).mean() < 1  # another JPEG library or another version of the fonts' renderer
