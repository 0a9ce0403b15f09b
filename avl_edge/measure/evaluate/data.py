"""Where questions come from."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ...errors import BadInput
from .demo import draw_questions
from .layouts import read_folder
from .questions import Questions, read_lines

DEMO = "demo"
_DEMO_COUNT = 200


def read_questions(data: str, seed: int, count: int | None, scratch: Path) -> Questions:
    """``count`` questions (None: all, or a few hundred drawn ones) of ``data``, chosen by ``seed``.

    ``data`` is ``demo``, a JSONL file or the folder of a data set; drawn pictures go to ``scratch``. Raises
    :class:`BadInput` when there is no such data or none of its questions can be asked.
    """
    if data == DEMO:
        found = replace(read_lines(draw_questions(scratch, seed, count or _DEMO_COUNT)), name=DEMO)
    elif os.path.isdir(data):
        found = read_folder(Path(data))
    elif os.path.exists(data):
        found = read_lines(Path(data))
    else:
        raise BadInput(f"there is no data {data!r}: give 'demo', a JSONL file or the folder of a data set")
    if not found.items:
        first = f"{found.problems[0].where}: {found.problems[0].reason}" if found.problems else "there are none"
        raise BadInput(f"no question of {data} can be asked ({first})")
    return found if count is None else found.sample(count, seed)
