"""Train the demo model: ``python -m tools.demo_model.train --minutes 75``.

Continues from the checkpoint in the run's folder if there is one, else from ``--init`` (a directory as exported), else
from nothing. Ctrl-C or SIGTERM saves and stops. Where other programs share the processor, set
``OMP_WAIT_POLICY=passive`` in the environment: it keeps waiting threads from using it up.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Annotated

import torch
import typer

from tools.demo_model.fast import keep_freed_memory
from tools.demo_model.layout import load_weights
from tools.demo_model.schedule import parse_plan
from tools.demo_model.tokenizer import load_tokenizer
from tools.demo_model.trainer import Options, Trainer

# Shares of ``--minutes`` when no plan is given.
FROM_NOTHING = (("vision", 0.15), ("find", 0.20), ("grow", 0.25), ("anneal", 0.25), ("read", 0.15))
FROM_WEIGHTS = (("probe", 0.03), ("anneal", 0.57), ("read", 0.40))


def default_plan(minutes: float, from_weights: bool) -> str:
    """The stages of a run of ``minutes``."""
    shares = FROM_WEIGHTS if from_weights else FROM_NOTHING
    return ",".join(f"{name}:{minutes * share:.2f}" for name, share in shares)


def main(
    minutes: Annotated[float, typer.Option(help="Minutes of training in all.")] = 75.0,
    plan: Annotated[str, typer.Option(help="Stages instead, as vision:20,find:20,anneal:40,read:15 in minutes.")] = "",
    folder: Annotated[Path, typer.Option(help="Where checkpoint, tokenizer and log are.")] = Path("runs/demo"),
    init: Annotated[Path | None, typer.Option(help="An exported directory to begin from.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the pictures.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that draw pictures.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of the CPU.")] = 2,
    batch: Annotated[int, typer.Option(help="Pictures per step; 0: the recipe's.")] = 0,
    compile_layers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the layers; pays on a GPU.")
    ] = False,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 4.0,
) -> None:
    """Train, or continue to train."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    if init is not None and not (folder / "tokenizer.json").exists():
        shutil.copy(init / "tokenizer.json", folder / "tokenizer.json")
    load_tokenizer(folder / "tokenizer.json")
    stages = parse_plan(plan or default_plan(minutes, init is not None))
    options = Options(
        folder, stages, seed, device, workers, save_minutes=save_minutes, batch=batch, compile=compile_layers
    )
    trainer = Trainer(options)
    if options.checkpoint.exists():
        trainer.resume()
    elif init is not None:
        trainer.start_from(load_weights(init))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: trainer.stop())
    trainer.run()


if __name__ == "__main__":
    typer.run(main)
