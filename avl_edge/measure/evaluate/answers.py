"""Answers with what they cost, and the file that keeps them, so that an evaluation can be interrupted and resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...model.weight_format import WeightFormats
from ...request import Result
from .questions import Questions
from .settings import Setting


@dataclass(frozen=True)
class Answer:
    """One method's answer to the question of that index.

    Bytes are those of the row pool: ``bytes_stored`` at the end of the answer, ``bytes_peak`` at any time,
    ``bytes_full`` what full attention would hold. Times in milliseconds. ``kl_to_full`` in nats per token, where asked.
    """

    question: int
    method: str
    kv_fraction: float
    parameters: dict[str, float]
    text: str
    token_ids: tuple[int, ...]
    bytes_stored: int
    bytes_peak: int
    bytes_full: int
    rows_read_fraction: float
    bytes_read_fraction: float
    prefill_ms: float
    decode_ms_per_token: float
    kl_to_full: float | None = None

    @classmethod
    def of(cls, question: int, setting: Setting, result: Result, kl_to_full: float | None) -> Answer:
        """From the runtime's result."""
        return cls(
            question=question,
            method=setting.method,
            kv_fraction=setting.kv_fraction,
            parameters=result.settings,
            text=result.text,
            token_ids=result.token_ids,
            bytes_stored=result.kv.bytes_stored,
            bytes_peak=result.kv.bytes_peak,
            bytes_full=result.kv.bytes_full,
            rows_read_fraction=result.kv.rows_read_fraction,
            bytes_read_fraction=result.kv.bytes_read_fraction,
            prefill_ms=result.timings.prefill_ms,
            decode_ms_per_token=result.timings.decode_ms_per_token,
            kl_to_full=kl_to_full,
        )

    @property
    def setting(self) -> Setting:
        return Setting(self.method, self.kv_fraction)

    @property
    def decode_steps(self) -> int:
        """Steps after the prompt: the first token comes with it."""
        return max(len(self.token_ids) - 1, 0)


def describe(questions: Questions, model: Path, packed: WeightFormats, max_new_tokens: int, kl: bool) -> dict[str, Any]:
    """What answers depend on, but for the setting: resumed with anything else, they would not belong together."""
    files = [(path.name, path.stat()) for path in sorted(model.iterdir()) if path.is_file()]
    return {
        "questions": questions.digest(),
        "model": [[name, status.st_size, status.st_mtime_ns] for name, status in files],
        "max_new_tokens": max_new_tokens,
        "kl": kl,
        **packed.named(),
        "avl_edge": version("avl-edge"),
    }


class AnswerLog:
    """Answers by setting and question, also in a JSONL file if there is one.

    The file's first line is ``about``, which says what the answers are answers to; each answer is a line, written when
    it is known. A last line that was cut off is dropped. Raises :class:`BadInput` for a file about something else.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path = path
        self._about = json.dumps(about, sort_keys=True)
        self._answers: dict[tuple[Setting, int], Answer] = {}
        if path is not None:
            self._open(path)

    def __contains__(self, key: tuple[Setting, int]) -> bool:
        return key in self._answers

    def __getitem__(self, key: tuple[Setting, int]) -> Answer:
        return self._answers[key]

    def add(self, answer: Answer) -> None:
        """Keep ``answer``; it is in the file on return."""
        self._answers[answer.setting, answer.question] = answer
        if self.path is not None:
            self._append(self.path, json.dumps(asdict(answer), ensure_ascii=False))

    def _open(self, path: Path) -> None:
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror}): give --out another name") from None
        *whole, cut_off = content.split(b"\n")
        about, *lines = whole or [b""]
        first = f"{self._about}\n".encode()
        if not content.startswith(first) and not first.startswith(content):
            raise BadInput(f"{path} holds the answers of another evaluation: remove it or give --out another name")
        if cut_off:
            os.truncate(path, len(content) - len(cut_off))
        if not about:
            self._append(path, self._about)
        for number, line in enumerate(lines, 2):
            answer = _parse(path, number, line)
            self._answers[answer.setting, answer.question] = answer

    @staticmethod
    def _append(path: Path, line: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise BadInput(f"{path} cannot be written ({error.strerror}): give --out another place") from None


def _parse(path: Path, number: int, line: bytes) -> Answer:
    try:
        row = json.loads(line)
        return Answer(**{**row, "token_ids": tuple(row["token_ids"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadInput(f"line {number} of {path} is not an answer: remove the line to have it asked again") from None
