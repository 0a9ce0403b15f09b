"""Measure the shipped model on questions about scenes that were never trained on.

``python -m tools.demo_model.evaluate --seed 1 --questions 2000 --json``
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from PIL import Image
from rapidfuzz.distance import Levenshtein
from rich.console import Console
from rich.table import Table

from tools.demo_model.questions import KINDS, LONG, SINGLE_ITEM, Question, ask_any
from tools.demo_model.scenes import HELD_OUT_SEEDS, facts_of, render

QUESTIONS_PER_SCENE = 4
# Scenes between two seeds, so that different seeds never meet.
SEED_STRIDE = 10**6
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Answer:
    """A question and what the model said."""

    question: Question
    text: str

    @property
    def right(self) -> bool:
        return self.text == self.question.answer

    @property
    def errors(self) -> int:
        """Characters to change, insert or delete."""
        return Levenshtein.distance(self.text, self.question.answer)


class Answerer(Protocol):
    """Answers questions, each about its own picture."""

    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]: ...


def held_out(seed: int, count: int) -> list[tuple[int, Question]]:
    """``count`` questions with the numbers of their scenes, a few per scene."""
    first = HELD_OUT_SEEDS.start + seed * SEED_STRIDE
    asked: list[tuple[int, Question]] = []
    for number in range(first, first + -(-count // QUESTIONS_PER_SCENE)):
        facts, rng = facts_of(number), random.Random(number)
        asked += [(number, ask_any(facts, rng)) for _ in range(QUESTIONS_PER_SCENE)]
    return asked[:count]


def answer_all(asked: Sequence[tuple[int, Question]], answerer: Answerer, batch: int) -> Iterator[Answer]:
    """The model's answers, ``batch`` questions at a time."""
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        pictures = {number: render(number).image for number, _ in part}
        texts = answerer([pictures[number] for number, _ in part], [question.text for _, question in part])
        for (_, question), text in zip(part, texts, strict=True):
            yield Answer(question, text.strip())


def _figures(answers: Sequence[Answer]) -> dict[str, Any]:
    characters = sum(len(answer.question.answer) for answer in answers)
    return {
        "exact_match": round(sum(answer.right for answer in answers) / len(answers), 4),
        "character_error_rate": round(sum(answer.errors for answer in answers) / characters, 4),
        "questions": len(answers),
    }


def report(answers: Iterable[Answer]) -> dict[str, Any]:
    """Shares over all questions, over the groups of kinds, and for every kind that was asked."""
    every = list(answers)
    kinds = [kind for kind in KINDS if any(answer.question.kind == kind for answer in every)]
    by_type = {kind: _figures([a for a in every if a.question.kind == kind]) for kind in kinds}
    groups = {"single item": SINGLE_ITEM, "long reading": LONG}
    present = {name: [a for a in every if a.question.kind in group] for name, group in groups.items()}
    by_group = {name: _figures(found) for name, found in present.items() if found}
    return {**_figures(every), "by_group": by_group, "by_type": by_type}


def runtime_answerer(model: str) -> Answerer:
    """Answers by the product's own runtime."""
    from avl_edge import Options, Runtime

    runtime = Runtime.load(model)
    options = Options(max_new_tokens=MAX_NEW_TOKENS)

    def answer(images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        generations = [runtime.generate([i], q, options) for i, q in zip(images, questions, strict=True)]
        for generation in generations:
            for _ in generation:
                pass
        return [generation.result().text for generation in generations]

    return answer


def transformers_answerer(directory: Path) -> Answerer:
    """Answers by transformers: the independent reference."""
    hf: Any = importlib.import_module("transformers")
    processor = hf.LlavaProcessor.from_pretrained(directory, backend="pil")
    model = hf.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()

    def answer(images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        prompts = [_prompt(processor, question) for question in questions]
        inputs = processor(images=list(images), text=prompts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        texts: list[str] = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    return answer


def _prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt


def _print_table(figures: dict[str, Any]) -> None:
    table = Table("type", "questions", "exact match", "character error rate")
    rows = {**figures["by_type"], **figures["by_group"], "all": figures}
    for name, row in rows.items():
        cells = (str(row["questions"]), f"{row['exact_match']:.1%}", f"{row['character_error_rate']:.1%}")
        table.add_row(name, *cells)
    Console().print(table)


def _print_failures(answers: Iterable[Answer]) -> None:
    for answer in answers:
        if not answer.right:
            typer.echo(
                f"{answer.question.kind}: {answer.question.text} | {answer.question.answer} | {answer.text}", err=True
            )


def main(
    seed: Annotated[int, typer.Option(help="Chooses the held-out pictures and questions.")] = 1,
    questions: Annotated[int, typer.Option(help="How many questions.")] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    model: Annotated[str, typer.Option(help="Model name or directory.")] = "demo",
    reference: Annotated[
        Path | None, typer.Option(help="Answer with transformers from this directory instead.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Questions answered together.")] = 8,
    failures: Annotated[bool, typer.Option(help="Also print what was answered wrongly.")] = False,
) -> None:
    """Ask the model held-out questions and print how often it is right."""
    answerer = transformers_answerer(reference) if reference else runtime_answerer(model)
    answers = list(answer_all(held_out(seed, questions), answerer, batch))
    if failures:
        _print_failures(answers)
    figures = report(answers)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        _print_table(figures)


if __name__ == "__main__":
    typer.run(main)
