"""What rounding a decoder's weights costs on texts: perplexity, KL and agreement, beside the weights as they are.

    python -m tools.weight_perplexity --model real-decoder --data text:LICENSE --calibration README.md

A variant is named as ``tools.quantised_weights`` makes it: ``int4``, ``int4+aware`` with activation-aware scales,
``int4+aware+head`` with the head rounded too. How it is measured: :mod:`tools.text_perplexity`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from avl_edge.config import require
from avl_edge.errors import AvlEdgeError
from avl_edge.measure.perplexity import Window, WindowLayout, files_of, read_windows
from avl_edge.model.families import read_spec
from avl_edge.model.prompt import Processor
from avl_edge.model.prompt.text_tokenizer import TextTokenizer
from tools.quantised_weights import CALIBRATION_TOKENS, LEVELS, quantise
from tools.text_perplexity import load, rows_of, write

VARIANTS = "int8,int4,int4+aware,int4+head,int4+aware+head"


def rounded(directory: Path, variant: str, group: int, calibration: Sequence[int] | None) -> Any:
    """The model of ``directory`` with its weights through a variant and back."""
    weights, *options = variant.split("+")
    require(
        weights in LEVELS and set(options) <= {"aware", "head"},
        f"there are no weights {variant!r}: give {' or '.join(LEVELS)}, with +aware, +head or both behind it",
    )
    require("aware" not in options or calibration is not None, f"{variant} needs a text: give --calibration FILE")
    model = load(directory)
    aware = calibration if "aware" in options else None
    quantise(model, LEVELS[weights], group, head="head" in options, calibration=aware)
    return model


def evaluate(
    directory: Path,
    windows: Sequence[Window],
    layout: WindowLayout,
    variants: Sequence[str],
    group: int,
    calibration: Sequence[int] | None,
) -> list[dict[str, Any]]:
    """A row for the weights as they are, and one for each variant."""

    def changed(variant: str) -> Any:
        return rounded(directory, variant, group, calibration)

    return rows_of(load(directory), variants, changed, windows, layout, "weights")


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
    seconds = round(time.monotonic() - start)
    write("tools.weight_perplexity", model, windows, layout, rows, out, group=group, seconds=seconds)


if __name__ == "__main__":
    try:
        typer.run(main)
    except AvlEdgeError as error:
        typer.echo(f"weight_perplexity: {error}", err=True)
        sys.exit(error.exit_code)
