"""The demo's questions: drawn by the repository's generator, in a process of its own.

The generator stands in ``tools``, which may use this package and never the reverse; so it is run as a program that
leaves a folder in the common form, and nothing of it is imported here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ...errors import BadInput

_ROOT = Path(__file__).parents[3]
_PROGRAM = """
import json, pathlib, sys
root, folder, seed, count = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, root)
from tools.demo_model.evaluate import held_out
from tools.demo_model.scenes import render
with open(folder / "questions.jsonl", "w", encoding="utf-8") as lines:
    for number, question in held_out(seed, count):
        name = f"scene_{number}.png"
        if not (folder / name).exists():
            render(number).image.save(folder / name)
        row = {"image": name, "question": question.text, "answers": [question.answer], "kind": question.kind}
        lines.write(json.dumps(row) + "\\n")
"""


def draw_questions(folder: Path, seed: int, count: int, root: Path = _ROOT) -> Path:
    """Draw ``count`` held-out questions of ``seed`` into ``folder``; the JSONL file that was written.

    Raises :class:`BadInput` where the generator is missing: an installed package does not have it.
    """
    if not (root / "tools" / "demo_model" / "evaluate.py").is_file():
        raise BadInput(
            "the demo's questions are drawn by the repository's own generator, which an installed package does not "
            "have: install from a checkout (pip install -e .), or give --data a JSONL file"
        )
    arguments = [str(root), str(folder), str(seed), str(count)]
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, errors="replace", check=False
    )
    if run.returncode:
        last = (run.stderr.strip() or "no message").splitlines()[-1]
        raise BadInput(f"the demo's questions cannot be drawn ({last}): install the packages of the dev extra")
    return folder / "questions.jsonl"
