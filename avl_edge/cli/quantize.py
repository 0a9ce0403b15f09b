"""``avl-edge quantize``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..config import format_size
from ..model.families import read_spec
from ..model.prompt import Processor
from ..model.weight_format import WeightFormats
from ..package.quantize import calibration_prompts, quantize_checkpoint
from .options import HeadFormat, WeightsFormat, checkpoint_of
from .progress import progress
from .terminal import AsJson, Debug, readers_may_leave


def quantize(
    model: Annotated[str, typer.Argument(help="'demo', or the directory of a checkpoint in 16 or 32 bits.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint's folder, new or empty.")],
    weights: WeightsFormat = None,
    head: HeadFormat = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A folder of pictures: weights are scaled by what they read of the first 32 (AWQ)."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Pack a checkpoint's decoder in 8 or 4 bits, as compressed-tensors; interrupted, it goes on where it was."""
    directory, formats = checkpoint_of(model), WeightFormats.of(weights, head)
    prompts = []
    if calibration is not None:
        prompts = calibration_prompts(calibration, Processor.of(read_spec(directory), directory))
    with progress("quantising") as report:
        made = quantize_checkpoint(directory, out, formats, prompts, report)
    sizes = f"{format_size(made.bytes)} of weights instead of {format_size(made.source_bytes)}"
    print(f"avl-edge: {out} holds {sizes}", file=sys.stderr)
    document = {"directory": str(out), "bytes": made.bytes, "source_bytes": made.source_bytes}
    with readers_may_leave():
        print(json.dumps(document) if as_json else out)
