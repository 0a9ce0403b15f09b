"""``avl-edge build``"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ..backends import tensorrt as trt
from ..config import format_size
from ..package import engine
from ..package.export import PRECISIONS
from .options import checkpoint_of
from .progress import progress
from .terminal import AsJson, Debug, readers_may_leave


def build(
    model: Annotated[str, typer.Argument(help="'demo', or the directory of a LLaVA-1.5 checkpoint.")],
    out: Annotated[Path, typer.Option(help="The package's directory; one that is there is replaced when done.")],
    recipe: Annotated[
        str | None, typer.Option(help="A recipe that comes with the package, like llava-1.5, or a recipe's file.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"stored, {', '.join(PRECISIONS)}; goes before the recipe's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, and what it needs.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Build a package from a checkpoint: ONNX graphs of the vision tower and the decoder, engines on a device."""
    chosen = engine.Recipe() if recipe is None else engine.find_recipe(recipe)
    if precision is not None:
        chosen = replace(chosen, precision=precision)
    job = engine.Job.of(checkpoint_of(model), chosen)
    if dry_run:
        with readers_may_leave():
            print(json.dumps(job.to_dict()) if as_json else _plan(job, out))
        return
    with progress("exporting") as report:
        manifest, built = engine.build(job, out, version("avl-edge"), report, trt.decoder_plugin())
    holds = "holds" if built else "already holds"
    print(f"avl-edge: {out} {holds} the ONNX graphs{engines_built(manifest)}", file=sys.stderr)
    with readers_may_leave():
        print(manifest.dumps().rstrip("\n") if as_json else out / manifest.directory)


def engines_built(manifest: engine.Manifest) -> str:
    """What a package holds beside its graphs, as the end of a sentence; or why it holds no more."""
    if engine.DECODER_ENGINE in manifest.files:
        return f", {engine.VISION_ENGINE} and {engine.DECODER_ENGINE}"
    if engine.VISION_ENGINE in manifest.files:
        return f" and {engine.VISION_ENGINE}; the decoder's engine needs a TensorRT that takes plugins"
    return "; engines need TensorRT on the device"


def _plan(job: engine.Job, out: Path) -> str:
    shapes = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in job.recipe.shapes.items())
    prunes = "" if job.settings.prune_after is None else f", pruning after layer {job.settings.prune_after}"
    lines = [f"would build {out} from {job.directory}: {job.settings.precision}{prunes}, up to {shapes}"]
    lines += [f"  {name:<14} {format_size(size)} of weights" for name, size in job.plan.weights.items()]
    needs = (
        ("disk", job.plan.bytes, "for the weights; a package that is there stays until the new one is whole"),
        ("memory", job.export_memory, "to export"),
        ("memory", job.engine_memory, "about, to build the larger engine on the device"),
        ("memory", job.run_memory, "to run: weights, and the longest prompt's rows in full"),
    )
    return "\n".join([*lines, *(f"  {what:<14} {format_size(size)} {why}" for what, size, why in needs)])
