"""Questions about pictures with their right answers: what they are, and reading them from JSON lines."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...files import FETCH_LFS, LFS_POINTER, is_lfs_pointer

_MARK = "<image>"
"""A picture's place in questions that were written for LLaVA."""


@dataclass(frozen=True)
class Question:
    """One question. ``kind`` groups questions in the report; a ``formula`` is compared without spaces."""

    where: str
    image: Path
    text: str
    answers: tuple[str, ...]
    kind: str = ""
    formula: bool = False


@dataclass(frozen=True)
class Problem:
    """A question that was left out: where it stands in the data, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Questions:
    """A set of questions.

    ``metric`` is what the set is scored by (:data:`avl_edge.measure.evaluate.metrics.METRICS`); ``instruction`` what is
    asked beside each question; ``problems`` what was left out of it.
    """

    name: str
    items: tuple[Question, ...]
    problems: tuple[Problem, ...]
    metric: str = "exact_match"
    instruction: str = ""

    def sample(self, count: int, seed: int) -> Questions:
        """``count`` questions, chosen by ``seed``, in their order; all of them where there are no more."""
        if count >= len(self.items):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self.items)), count))
        return replace(self, items=tuple(self.items[i] for i in chosen))

    def prompt(self, question: Question) -> str:
        """What the model is asked."""
        return f"{question.text}\n{self.instruction}" if self.instruction else question.text

    def digest(self) -> str:
        """Tells two sets of questions apart; the folder that the pictures are in does not count."""
        parts = [[q.where, q.image.name, q.image.stat().st_size, q.text, q.answers, q.kind] for q in self.items]
        return hashlib.sha256(json.dumps([self.name, self.instruction, parts]).encode()).hexdigest()


class Collector:
    """Takes questions as they are found in data and keeps those that can be asked."""

    def __init__(self) -> None:
        self.items: list[Question] = []
        self.problems: list[Problem] = []
        self._pointers: list[str] = []

    @property
    def all_problems(self) -> tuple[Problem, ...]:
        """One for each question that was left out, and one for all whose pictures Git LFS has not brought."""
        if not self._pointers:
            return tuple(self.problems)
        first, more = self._pointers[0], len(self._pointers) - 1
        where = f"{first} and {more} more" if more else first
        return (*self.problems, Problem(where, f"the picture is a pointer of Git LFS: {FETCH_LFS} in its folder"))

    def reject(self, where: str, reason: str) -> None:
        """Leave a question out."""
        self.problems.append(Problem(where, reason))

    def add(self, where: str, image: Path, text: Any, answers: Any, kind: Any = "", formula: bool = False) -> None:
        """Keep a question, or leave it out and say why.

        ``answers`` is one text or number, or several; empty ones are dropped. One mark of a picture at either end of
        the question is the picture's place, which needs none.
        """
        given = [_spoken(each) for each in (answers if isinstance(answers, list) else [answers])]
        text = _unmarked(text) if isinstance(text, str) else text
        if not isinstance(text, str) or not text.strip():
            self.reject(where, "the question must be text")
        elif any(answer is None for answer in given):
            self.reject(where, "the answers must be a list of texts")
        elif not (kept := tuple(answer for answer in given if answer and answer.strip())):
            self.reject(where, "there is no answer to compare with")
        elif not os.path.isfile(image):  # Path.is_file fails on names that no file can have
            self.reject(where, f"there is no picture {image}")
        elif is_lfs_pointer(image):
            self._pointers.append(where)
        else:
            self.items.append(Question(where, image, text, kept, kind if isinstance(kind, str) else "", formula))


def _spoken(answer: Any) -> str | None:
    """An answer as text: a number as JSON writes it; None for what is neither."""
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        return json.dumps(answer)
    return answer if isinstance(answer, str) else None


def _unmarked(text: str) -> str:
    marked = text.strip()
    for shorter in (marked.removeprefix(_MARK), marked.removesuffix(_MARK)):
        if shorter != marked:
            return shorter.strip()
    return text


def read_lines(path: Path) -> Questions:
    """The questions of a JSONL file: ``{"image": "a.png", "question": "...", "answers": ["..."]}`` a line, or of one
    JSON array of such objects.

    Pictures stand relative to the file; ``kind`` may group questions. ``text`` may stand for ``question``, ``answer``
    for ``answers``, and a conversation of LLaVA's for both. A line that cannot be used is reported with its number,
    and the others go on. Raises :class:`BadInput` when the file cannot be read at all.
    """
    found = Collector()
    for where, row in _rows(path):
        if isinstance(row, str):
            found.reject(where, row)
        elif not isinstance(row.get("image"), str) or not row["image"]:
            found.reject(where, "it needs an image, the path of a picture")
        else:
            text, answers = _asked(row)
            found.add(where, path.parent / row["image"], text, answers, row.get("kind"))
    return Questions(path.name, tuple(found.items), found.all_problems)


def _asked(row: dict[str, Any]) -> tuple[Any, Any]:
    """The question and its answers, by the names that they commonly have."""
    turns = row.get("conversations")
    if isinstance(turns, list) and len(turns) >= 2 and all(isinstance(turn, dict) for turn in turns[:2]):
        return turns[0].get("value"), turns[1].get("value")
    text, answers = row.get("question"), row.get("answers")
    return row.get("text") if text is None else text, row.get("answer") if answers is None else answers


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Where each object of the file stands, and the object, or what is wrong with it."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise BadInput(f"the questions {path} cannot be read ({error.strerror})") from None
    if content.startswith(LFS_POINTER):
        raise BadInput(f"the questions {path} are a pointer of Git LFS: {FETCH_LFS} in its folder")
    listed = _array(content)
    if listed is not None:
        for number, row in enumerate(listed, 1):
            yield f"entry {number}", row if isinstance(row, dict) else "it must be a JSON object"
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", _parse(line)


def _array(content: bytes) -> list[Any] | None:
    """The entries of a file that is one JSON array with objects in it."""
    if not content.lstrip().startswith(b"["):
        return None
    try:
        listed = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return listed if isinstance(listed, list) and any(isinstance(row, dict) for row in listed) else None


def _parse(line: bytes) -> dict[str, Any] | str:
    """The object in a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "it is not UTF-8 text"
    except (ValueError, RecursionError):
        return "it is not valid JSON"
    return row if isinstance(row, dict) else "it must be a JSON object"
