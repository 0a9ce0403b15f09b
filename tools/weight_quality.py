"""What packed weights cost in the demo model's answers: exact match, KL to the plain weights, bytes and time of a step.

    python -m tools.weight_quality --questions 400 --seed 5 --threads 1

Each variant is what ``avl-edge run --weights X --head Y`` runs, on the demo's own questions. The KL is per token, in
nats, over the plain weights' answers, of the torch backend; times are of the backend that answers.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from avl_edge import Options, Runtime
from avl_edge.errors import AvlEdgeError
from avl_edge.measure.evaluate import Divergence, Question, read_questions
from avl_edge.measure.evaluate.divergence import kl_per_token
from avl_edge.measure.evaluate.metrics import exact_match
from avl_edge.model.demo import DEMO
from avl_edge.model.weight_format import WeightFormats
from avl_edge.request import Result
from tools.record import machine

BODIES = (None, "int8", "int4:32", "int4:64", "int4")
HEADS = (None, "int8")
_MOST_TOKENS = 32


class Variant:
    """The demo with its decoder packed, and what came of it."""

    def __init__(self, body: str | None, head: str | None, threads: int) -> None:
        self.runtime = Runtime.load("demo", weights=body, head=head, threads=threads, threaded=False)
        self.divergence = Divergence(self.runtime, DEMO, WeightFormats.of(body, head))
        self.names = {"weights": body, "head": head}
        self.right: list[float] = []
        self.kl: list[float] = []
        self.ms: list[float] = []

    def ask(self, question: Question, prompt: str) -> Result:
        options = Options(method="full", max_new_tokens=_MOST_TOKENS)
        result = self.runtime.generate([question.image], prompt, options).result()
        self.right.append(exact_match(result.text, question.answers))
        self.ms.append(result.timings.decode_ms_per_token)
        return result

    def row(self) -> dict[str, Any]:
        model = self.runtime.planner.model
        return {
            **self.names,
            "exact_match": statistics.mean(self.right),
            "kl": statistics.mean(self.kl),
            "ms_per_token": statistics.median(self.ms),
            "step_bytes": model.step_bytes(model.stored) + model.float32_scale_bytes(model.stored),
        }


def measure(questions: int, seed: int, threads: int) -> list[dict[str, Any]]:
    """A row for each variant, the plain weights first; question by question, so that a slow moment falls on all."""
    variants = [Variant(body, head, threads) for head in HEADS for body in BODIES]
    with tempfile.TemporaryDirectory() as scratch:
        asked = read_questions("demo", seed, questions, Path(scratch))
        for number, question in enumerate(asked.items, 1):
            _ask_all(variants, question, asked.prompt(question))
            print(f"\r{number} of {len(asked.items)}", end="", file=sys.stderr, flush=True)
    return [variant.row() for variant in variants]


def _ask_all(variants: Sequence[Variant], question: Question, prompt: str) -> None:
    plain = variants[0]
    request = plain.runtime.prepare([question.image], prompt, Options(method="full", max_new_tokens=_MOST_TOKENS))
    features = plain.divergence.encode(request)
    tokens = plain.ask(question, prompt).token_ids
    expected = plain.divergence.log_probabilities(request, features, tokens)
    for variant in variants:
        if variant is not plain:
            variant.ask(question, prompt)
        variant.kl.append(kl_per_token(expected, variant.divergence.log_probabilities(request, features, tokens)))


def main(
    questions: Annotated[int, typer.Option(min=1, help="How many questions.")] = 400,
    seed: Annotated[int, typer.Option(help="By which they are drawn.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of a decode step, and of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
) -> None:
    """Print what each variant of the weights costs, as one JSON document."""
    torch.set_num_threads(threads)
    begin = time.monotonic()
    rows = measure(questions, seed, threads)
    about = {"command": f"python -m tools.weight_quality --questions {questions} --seed {seed} --threads {threads}"}
    seconds = round(time.monotonic() - begin)
    text = json.dumps(
        {**about, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "seconds": seconds, "results": rows},
        indent=1,
    )
    if out is not None:
        out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    try:
        typer.run(main)
    except AvlEdgeError as error:
        typer.echo(f"weight_quality: {error}", err=True)
        sys.exit(error.exit_code)
