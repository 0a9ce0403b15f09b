"""What rounding a decoder's weights costs on texts: perplexity, KL and agreement, beside the weights as they are.

    python -m tools.weight_perplexity --model real-decoder --data text:LICENSE --calibration README.md

The windows are those of ``avl-edge eval --data text:...``, and so are the figures; transformers computes them, each
window in one pass. A variant is named as ``tools.quantised_weights`` makes it: ``int4``, ``int4+aware`` with
activation-aware scales, ``int4+aware+head`` with the head rounded too. The unrounded weights' logits are held, float32.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from avl_edge.config import require
from avl_edge.errors import AvlEdgeError
from avl_edge.measure.perplexity import Window, WindowLayout, compare, files_of, read_windows
from avl_edge.model.prompt import Processor
from avl_edge.model.prompt.text_tokenizer import TextTokenizer
from avl_edge.model.spec import read_spec
from tools.quantised_weights import CALIBRATION_TOKENS, LEVELS, quantise
from tools.record import machine

VARIANTS = "int8,int4,int4+aware,int4+head,int4+aware+head"
_TOKENS_AT_ONCE = 32  # of which two distributions in float64 are compared


def predictions(model: Any, windows: Sequence[Window], layout: WindowLayout) -> Iterator[Tensor]:
    """The logits ``[tokens, vocabulary]``, float32, of each window's predicted tokens."""
    for window in windows:
        with torch.inference_mode():
            logits: Tensor = model(
                input_ids=torch.tensor([window.token_ids[:-1]]), logits_to_keep=layout.predicted
            ).logits
        yield logits[0].float()


def errors(reference: Tensor, own: Tensor, window: Window, layout: WindowLayout) -> npt.NDArray[np.float64]:
    """Negative log-likelihood, KL and agreement of ``own`` predictions: ``[3, tokens]``."""
    targets = torch.tensor(window.token_ids[layout.prompt :])
    parts = zip(*(torch.split(each, _TOKENS_AT_ONCE) for each in (reference, own, targets)), strict=True)
    return np.concatenate([compare(torch.stack([a, b]), target)[:, 1] for a, b, target in parts], axis=-1)


def rounded(directory: Path, variant: str, group: int, calibration: Sequence[int] | None) -> Any:
    """The model of ``directory`` with its weights through a variant and back."""
    weights, *options = variant.split("+")
    require(
        weights in LEVELS and set(options) <= {"aware", "head"},
        f"there are no weights {variant!r}: give {' or '.join(LEVELS)}, with +aware, +head or both behind it",
    )
    require("aware" not in options or calibration is not None, f"{variant} needs a text: give --calibration FILE")
    model = _load(directory)
    aware = calibration if "aware" in options else None
    quantise(model, LEVELS[weights], group, head="head" in options, calibration=aware)
    return model


def _load(directory: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(directory, dtype="auto").eval()


def evaluate(
    directory: Path,
    windows: Sequence[Window],
    layout: WindowLayout,
    variants: Sequence[str],
    group: int,
    calibration: Sequence[int] | None,
) -> list[dict[str, Any]]:
    """A row for the weights as they are, and one for each variant."""
    references = list(predictions(_load(directory), windows, layout))
    rows: list[dict[str, Any]] = []
    for variant in ("", *variants):
        own = predictions(rounded(directory, variant, group, calibration), windows, layout) if variant else references
        found = [errors(*each, layout) for each in zip(references, own, windows, strict=True)]
        likelihood, kl, same = np.stack(found, axis=1)
        perplexity = float(np.exp(likelihood.mean()))
        rows.append(
            {
                "weights": variant,
                "perplexity": perplexity,
                "perplexity_change": perplexity / rows[0]["perplexity"] - 1 if rows else 0.0,
                "kl": max(float(kl.mean()), 0.0),
                "same_token": float(same.mean()),
            }
        )
    return rows


def _calibration(file: Path | None, tokenizer: TextTokenizer) -> Sequence[int] | None:
    if file is None:
        return None
    return read_windows([file], tokenizer, WindowLayout(CALIBRATION_TOKENS, 1), 1)[0].token_ids


def main(
    model: Annotated[Path, typer.Option(help="A LLaVA-1.5 checkpoint.")],
    data: Annotated[str, typer.Option(help="text:FILE,FILE, as avl-edge eval takes it.")],
    weights: Annotated[str, typer.Option(help="Variants, with commas.")] = VARIANTS,
    group: Annotated[int, typer.Option(min=1, help="Inputs that share a scale.")] = 128,
    calibration: Annotated[Path | None, typer.Option(help="The text of activation-aware scales.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are not predicted.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
) -> None:
    """Print what each variant of the weights costs, as one JSON document."""
    start = time.monotonic()
    if threads is not None:
        torch.set_num_threads(threads)
    tokenizer, layout = Processor.of(read_spec(model), model).text, WindowLayout(window, prompt_tokens)
    windows = read_windows(files_of(data), tokenizer, layout, 1)
    rows = evaluate(model, windows, layout, weights.split(","), group, _calibration(calibration, tokenizer))
    document = {
        "command": shlex.join(["python", "-m", "tools.weight_perplexity", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "seconds": round(time.monotonic() - start),
        "model": model.name,
        "texts": [{"name": each.name, "sha256": each.digest} for each in windows],
        "windows": len(windows),
        "window": window,
        "prompt": prompt_tokens,
        "tokens": len(windows) * layout.predicted,
        "group": group,
        "results": rows,
    }
    text = json.dumps(document, indent=1)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        typer.run(main)
    except AvlEdgeError as error:
        typer.echo(f"weight_perplexity: {error}", err=True)
        sys.exit(error.exit_code)
