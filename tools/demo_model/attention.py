"""What the model's attention is like: is it a fair test-bed for methods that read only a part of the picture?

``python -m tools.demo_model.attention --questions 100 --json``

Attention is transformers' (eager, float32), averaged over heads, from the tokens that choose the answer to the 576
tokens of the picture, while the model's own greedy answer is read once more. Per decoder layer:

- ``image_share``: how much of all attention goes to the picture;
- ``holds_80``: the smallest share of image tokens that together hold 80 % of the picture's attention;
- ``previous_step``, ``prefill``, ``first_layer``: PPCI(10 %) (A-VL, arXiv 2409.14846, section 3) with the same layer
  one step before, with the last token of the prompt, and with the first layer at the same step: the share of the top
  tenth of image tokens that both have in common. Two random tenths have 0.1.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from tools.demo_model.evaluate import held_out
from tools.demo_model.scenes import render

TOP = 0.10
MASS = 0.80
MAX_NEW_TOKENS = 160
DEMO = Path("avl_edge/demo")
Scores = npt.NDArray[np.float32]


class Reader:
    """The shipped model in transformers, with its attention in sight."""

    def __init__(self, directory: Path) -> None:
        hf: Any = importlib.import_module("transformers")
        self._processor = hf.LlavaProcessor.from_pretrained(directory, backend="pil")
        load = hf.LlavaForConditionalGeneration.from_pretrained
        self._model = load(directory, dtype=torch.float32, attn_implementation="eager").eval()
        self.image_token: int = self._model.config.image_token_id

    @torch.inference_mode()
    def __call__(self, image: Image.Image, question: str) -> tuple[Scores, Scores]:
        """Attention ``[layers, steps, 576]`` of each token that chooses an answer token, the prompt's last one first;
        and how much of all attention that is, ``[layers, steps]``."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        prompt = self._processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self._processor(images=image, text=prompt, return_tensors="pt")
        ids = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        length = inputs["input_ids"].shape[1]
        again = self._model(input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True)
        picture = ids[0] == self.image_token
        rows = torch.stack([layer[0, :, length - 1 : -1].mean(0) for layer in again.attentions])[:, :, picture]
        return rows.numpy(), rows.sum(-1).numpy()


def holds(scores: Scores, mass: float = MASS) -> Scores:
    """The smallest share of the last axis whose values make up ``mass`` of its sum."""
    ordered = -np.sort(-scores, axis=-1)
    reached = np.cumsum(ordered, axis=-1) >= mass * ordered.sum(-1, keepdims=True)
    share: Scores = ((reached.argmax(-1) + 1) / scores.shape[-1]).astype(np.float32)
    return share


def overlap(a: Scores, b: Scores, top: float = TOP) -> Scores:
    """PPCI: the share that the top ``top`` of ``a`` and of ``b`` along the last axis have in common."""
    count = int(top * a.shape[-1])
    first, second = (np.argsort(-scores, axis=-1, kind="stable")[..., :count] for scores in np.broadcast_arrays(a, b))
    common: Scores = (first[..., :, None] == second[..., None, :]).any(-1).mean(-1).astype(np.float32)
    return common


def measure(reader: Reader, seed: int, questions: int) -> Iterator[dict[str, Scores]]:
    """The figures of each held-out question, ``[layers]`` each; those between steps only where there are two."""
    for number, question in held_out(seed, questions):
        scores, share = reader(render(number).image, question.text)
        figures = {
            "image_share": share.mean(1),
            "holds_80": holds(scores).mean(1),
            "first_layer": overlap(scores, scores[:1]).mean(1),
        }
        if scores.shape[1] > 1:
            figures["previous_step"] = overlap(scores[:, 1:], scores[:, :-1]).mean(1)
            figures["prefill"] = overlap(scores[:, 1:], scores[:, :1]).mean(1)
        yield figures


def report(measured: list[dict[str, Scores]]) -> list[dict[str, float]]:
    """The mean over questions, a row per layer."""
    names = ("image_share", "holds_80", "previous_step", "prefill", "first_layer")
    means = {name: np.mean([each[name] for each in measured if name in each], axis=0) for name in names}
    return [{name: round(float(means[name][layer]), 3) for name in names} for layer in range(len(means["holds_80"]))]


def main(
    seed: Annotated[int, typer.Option(help="Chooses the held-out pictures and questions.")] = 2,
    questions: Annotated[int, typer.Option(help="How many questions.")] = 100,
    model: Annotated[Path, typer.Option(help="An exported directory.")] = DEMO,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print how the model attends to its pictures, layer by layer."""
    layers = report(list(measure(Reader(model), seed, questions)))
    if as_json:
        typer.echo(json.dumps({"seed": seed, "questions": questions, "layers": layers}, indent=2))
        return
    table = Table("layer", *layers[0])
    for number, row in enumerate(layers):
        table.add_row(str(number), *(f"{value:.3f}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
