"""From answers to figures: one row per setting, plain data that becomes JSON, a table and plots."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from ...errors import BadInput, TooLarge
from ...machine import device
from ...serving.runtime import Runtime
from .answers import Answer
from .metrics import CAPTION_METRIC, FEWEST_PEOPLE, METRICS, character_error_rate, scores, unrewarded
from .questions import Question, Questions
from .run import Asked
from .settings import REFERENCE, Setting

_RESAMPLES = 1000


def report(runtime: Runtime, questions: Questions, asked: Asked, metric: str) -> dict[str, Any]:
    """Everything about an evaluation, as a JSON document.

    ``results`` has a row per setting. There ``score`` is the mean by ``metric`` with a 95 % interval, fractions are of
    full attention's, bytes and times are means per question or token, and ``token_identity`` is the share of tokens
    that stand where full attention has the same one (of the longer answer's; None where full was not asked);
    ``kl_to_full`` is the mean over answers of their KL per token, in nats (None where it was not asked).
    ``warnings`` says what a score does not mean; ``problems`` and ``unreachable`` name the questions and settings that
    were left out. ``score_interval`` is None for a single question.

    Raises :class:`TooLarge` or :class:`BadInput` where nothing is left.
    """
    _check_any(asked)
    reference = asked.answers.get(REFERENCE, {})
    problems = [*questions.problems, *asked.problems]
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "model": runtime.name,
        "data": questions.name,
        "questions": len(next(iter(asked.answers.values()))),
        "metric": metric,
        "results": [_row(setting, answers, questions, reference, metric) for setting, answers in asked.answers.items()],
        "warnings": _warnings(metric, questions),
        "problems": [asdict(problem) for problem in problems],
        "unreachable": [{**asdict(setting), "reason": reason} for setting, reason in asked.unreachable.items()],
    }


def _warnings(metric: str, questions: Questions) -> list[str]:
    lost = unrewarded(metric, questions.items)
    if not lost:
        return []
    question, answer = lost[0]
    where = question.where + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
    return [
        f"{metric} gives nothing for {answer!r}, the reference of {where}: the official evaluator normalises what a "
        "model says and leaves such references as they are"
    ]


def _check_any(asked: Asked) -> None:
    if not asked.answers:
        raise TooLarge(next(iter(asked.unreachable.values())))
    if not any(asked.answers.values()):
        problem = asked.problems[0]
        raise BadInput(f"no question could be asked ({problem.where}: {problem.reason})")


def _row(
    setting: Setting,
    answers: Mapping[int, Answer],
    questions: Questions,
    reference: Mapping[int, Answer],
    metric: str,
) -> dict[str, Any]:
    items = [questions.items[index] for index in answers]
    return {
        "method": setting.method,
        "kv_fraction": setting.kv_fraction,
        "parameters": _parameters(answers.values()),
        **_quality(items, [answer.text for answer in answers.values()], metric),
        "token_identity": _identity(answers, reference) if reference else None,
        "kl_to_full": _divergence(list(answers.values())),
        **_cost(list(answers.values())),
    }


def _parameters(answers: Iterable[Answer]) -> dict[str, Any]:
    """The value of each parameter, or the least and the greatest where prompts of other lengths had other ones."""
    found: dict[str, list[float]] = {}
    for answer in answers:
        for name, value in answer.parameters.items():
            found.setdefault(name, []).append(value)
    ranges = {name: (min(values), max(values)) for name, values in found.items()}
    return {name: least if least == most else [least, most] for name, (least, most) in ranges.items()}


def _quality(questions: Sequence[Question], texts: Sequence[str], metric: str) -> dict[str, Any]:
    every = {name: scores(name, questions, texts) for name in METRICS if name in (metric, *_cheap(questions))}
    own = every[metric]
    kinds = sorted({question.kind for question in questions} - {""})
    return {
        "questions": len(questions),
        "score": _mean(own),
        "score_interval": _interval(own),
        **{name: _mean(values) for name, values in every.items()},
        "character_error_rate": character_error_rate(questions, texts),
        "by_kind": {kind: _part(kind, questions, texts, own) for kind in kinds},
    }


def _cheap(questions: Sequence[Question]) -> list[str]:
    """The metrics that are always told. With a few people's answers not even a perfect one has a VQA accuracy of 1."""
    asked_people = all(len(question.answers) >= FEWEST_PEOPLE for question in questions)
    return [n for n in METRICS if n != CAPTION_METRIC and (asked_people or not n.endswith("vqa_accuracy"))]


def _part(kind: str, questions: Sequence[Question], texts: Sequence[str], own: Sequence[float]) -> dict[str, Any]:
    part = [i for i, question in enumerate(questions) if question.kind == kind]
    return {
        "questions": len(part),
        "score": _mean([own[i] for i in part]),
        "character_error_rate": character_error_rate([questions[i] for i in part], [texts[i] for i in part]),
    }


def _identity(answers: Mapping[int, Answer], reference: Mapping[int, Answer]) -> float:
    pairs = [(answer.token_ids, reference[index].token_ids) for index, answer in answers.items()]
    same = sum(a == b for own, full in pairs for a, b in zip(own, full, strict=False))
    return same / sum(max(len(own), len(full)) for own, full in pairs)


def _divergence(answers: Sequence[Answer]) -> float | None:
    known = [answer.kl_to_full for answer in answers if answer.kl_to_full is not None]
    return _mean(known) if known else None


def _cost(answers: Sequence[Answer]) -> dict[str, Any]:
    steps = [answer.decode_steps for answer in answers]
    stored = [answer.bytes_stored for answer in answers]
    return {
        "new_tokens": _mean([len(answer.token_ids) for answer in answers]),
        "bytes_stored": _mean(stored),
        "bytes_peak": _mean([answer.bytes_peak for answer in answers]),
        "bytes_stored_fraction": sum(stored) / sum(answer.bytes_full for answer in answers),
        "rows_read_fraction": _mean([answer.rows_read_fraction for answer in answers], steps),
        "bytes_read_fraction": _mean([answer.bytes_read_fraction for answer in answers], steps),
        "prefill_ms": _mean([answer.prefill_ms for answer in answers]),
        "ms_per_token": _mean([answer.decode_ms_per_token for answer in answers], steps),
    }


def _mean(values: Sequence[float], weights: Sequence[int] | None = None) -> float | None:
    """None where nothing has weight: answers of a single token have no decode step."""
    if weights is None:
        return sum(values) / len(values)
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else None


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean over questions: percentiles of a bootstrap with a fixed seed. One says nothing."""
    if len(values) < 2:
        return None
    rng = np.random.default_rng(0)
    sample = np.asarray(values)
    means = [sample[rng.integers(0, len(sample), len(sample))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    facts = device.probe("/")
    return {
        "model": facts.identity.model,
        "cpu": facts.cpu.name or platform.machine(),
        "power_mode": facts.power.mode_name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "avl_edge": version("avl-edge"),
    }
