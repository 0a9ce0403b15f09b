"""Asking every question in every setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...config import Options, Progress
from ...errors import BadInput, DoesNotFit
from ...kv.cache import prompt_shape
from ...model.images import open_image
from ...serving.requests import Request
from ...serving.runtime import Runtime
from .answers import Answer, AnswerLog
from .divergence import Divergence
from .questions import Problem, Question, Questions
from .settings import REFERENCE, Setting


@dataclass
class Asked:
    """What came of it: the ``answers`` of each setting by question; ``problems``, questions that could not be asked;
    ``unreachable``, settings that a question's prompt ruled out, with the reason."""

    answers: dict[Setting, dict[int, Answer]]
    problems: list[Problem] = field(default_factory=list)
    unreachable: dict[Setting, str] = field(default_factory=dict)

    def drop_setting(self, setting: Setting, reason: str) -> None:
        """Drop a setting as a whole: a mean over other questions than the others' could not be compared."""
        del self.answers[setting]
        self.unreachable[setting] = reason


class EvaluationRun:
    """Asks ``runtime`` and keeps the answers in ``log``; an answer is at most ``max_new_tokens`` long.

    With ``divergence`` it tells each answer's KL too; full attention must then be among the settings.
    """

    def __init__(
        self, runtime: Runtime, log: AnswerLog, max_new_tokens: int, divergence: Divergence | None = None
    ) -> None:
        self._runtime = runtime
        self._log = log
        self._max_new_tokens = max_new_tokens
        self._divergence = divergence

    def ask_all(self, questions: Questions, settings: Sequence[Setting], progress: Progress | None = None) -> Asked:
        """The answers to ``questions``; only those that are not in the log are asked for.

        Question by question, so that a slow moment of the machine falls on all settings alike.
        """
        asked = Asked({setting: {} for setting in settings})
        for index, question in enumerate(questions.items):
            missing = [setting for setting in asked.answers if (setting, index) not in self._log]
            try:
                full, requests = self._prepare(question, questions.prompt(question), missing, asked)
            except (BadInput, DoesNotFit) as error:
                asked.problems.append(Problem(question.where, str(error)))
            else:
                self._answer(index, full, requests)
                for setting, answers in asked.answers.items():
                    answers[index] = self._log[setting, index]
            if progress:
                progress(index + 1, len(questions.items))
        return asked

    def _prepare(
        self, question: Question, prompt: str, settings: Sequence[Setting], asked: Asked
    ) -> tuple[Request | None, dict[Setting, Request]]:
        """Full attention's request, and that of each of ``settings`` that this question allows; nothing for none.

        Raises :class:`BadInput` or :class:`DoesNotFit` where the question cannot be asked.
        """
        if not settings:
            return None, {}
        picture = open_image(question.image, self._runtime.max_pixels)
        full = self._runtime.prepare(
            [picture], prompt, Options(method=REFERENCE.method, max_new_tokens=self._max_new_tokens)
        )
        shape = prompt_shape(len(full.prompt), full.prompt.spans)
        requests = {}
        for setting in settings:
            try:
                options = setting.options(shape, self._runtime.kv_shape, self._max_new_tokens)
                requests[setting] = self._runtime.prepare([picture], prompt, options)
            except DoesNotFit as error:
                asked.drop_setting(setting, f"{error} ({question.where})")
        return full, requests

    def _answer(self, index: int, full: Request | None, requests: dict[Setting, Request]) -> None:
        """Ask for the answers to ``requests`` and put them into the log."""
        results = {setting: self._runtime.submit(request).result() for setting, request in requests.items()}
        distances: dict[Setting, float] = {}
        if self._divergence and full:
            token_ids = (results.get(REFERENCE) or self._log[REFERENCE, index]).token_ids
            distances = self._divergence.from_full(full, token_ids, requests)
        for setting, result in results.items():
            self._log.add(Answer.of(index, setting, result, distances.get(setting)))
