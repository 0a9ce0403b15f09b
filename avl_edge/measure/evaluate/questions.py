"""Questions about pictures with their right answers: what they are, and reading them from JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import BadInput


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

    def reject(self, where: str, reason: str) -> None:
        """Leave a question out."""
        self.problems.append(Problem(where, reason))

    def add(self, where: str, image: Path, text: Any, answers: Any, kind: Any = "", formula: bool = False) -> None:
        """Keep a question, or leave it out and say why. ``answers`` is one text or several; empty ones are dropped."""
        given = [answers] if isinstance(answers, str) else answers
        if not isinstance(text, str) or not text.strip():
            self.reject(where, "the question must be text")
        elif not isinstance(given, list) or not all(isinstance(answer, str) for answer in given):
            self.reject(where, "the answers must be a list of texts")
        elif not (kept := tuple(answer for answer in given if answer.strip())):
            self.reject(where, "there is no answer to compare with")
        elif not os.path.isfile(image):  # Path.is_file fails on names that no file can have
            self.reject(where, f"there is no picture {image}")
        else:
            self.items.append(Question(where, image, text, kept, kind if isinstance(kind, str) else "", formula))


def read_lines(path: Path) -> Questions:
    """The questions of a JSONL file: ``{"image": "a.png", "question": "...", "answers": ["..."]}`` a line.

    Pictures stand relative to the file; ``kind`` may group questions. A line that cannot be used is reported with its
    number, and the others go on. Raises :class:`BadInput` when the file cannot be read at all.
    """
    found = Collector()
    for number, line in _lines(path):
        where = f"line {number}"
        row = _parse(line)
        if isinstance(row, str):
            found.reject(where, row)
        elif not isinstance(row.get("image"), str) or not row["image"]:
            found.reject(where, "it needs an image, the path of a picture")
        else:
            found.add(where, path.parent / row["image"], row.get("question"), row.get("answers"), row.get("kind"))
    return Questions(path.name, tuple(found.items), tuple(found.problems))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, from 1, without the blank ones. Bytes: one line that is not UTF-8 must not spoil the others."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"the questions {path} cannot be read ({error.strerror})") from None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, line


def _parse(line: bytes) -> dict[str, Any] | str:
    """The object in a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "it is not UTF-8 text"
    except (ValueError, RecursionError):
        return "it is not valid JSON"
    return row if isinstance(row, dict) else "it must be a JSON object"
