"""What the commands share: options, the progress bar, and a reader that leaves."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..config import parse_parameter
from ..errors import BadInput, BadModel
from ..kv.methods import parameter_defaults, parameter_help
from ..model.checkpoint import Progress as Report
from ..package.engine import is_package
from ..serving.runtime import DEMO

BROKEN_PIPE = 128 + signal.SIGPIPE

stderr = Console(stderr=True, highlight=False)

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Debug: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
Model: TypeAlias = Annotated[str, typer.Option(help="'demo', or the directory of a LLaVA-1.5 checkpoint.")]


def _parameter(name: str) -> str:
    """The help of a method's parameter that has an option of its own."""
    return f"{parameter_help(name)} [{parameter_defaults(name)}]"


PrefillKeep: TypeAlias = Annotated[float | None, typer.Option(help=_parameter("prefill_keep"))]
Secondary: TypeAlias = Annotated[float | None, typer.Option(help=_parameter("secondary"))]
Core: TypeAlias = Annotated[float | None, typer.Option(help=_parameter("core"))]
Refresh: TypeAlias = Annotated[int | None, typer.Option(help=_parameter("refresh"))]
TextKeep: TypeAlias = Annotated[float | None, typer.Option(help=_parameter("text_keep"))]
_FORMAT_NAMES = "exact, int8, int4, lowrank:R or lowrank:R+int8"
KvFormat: TypeAlias = Annotated[
    str | None, typer.Option(help=f"How rows are stored: {_FORMAT_NAMES}. Of every tier without a format of its own.")
]
TextFormat: TypeAlias = Annotated[str | None, typer.Option(help="Of text rows: exact, int8 or int4.")]
CoreFormat: TypeAlias = Annotated[str | None, typer.Option(help="Of core rows.")]
SecondaryFormat: TypeAlias = Annotated[str | None, typer.Option(help="Of secondary rows.")]
Parameters: TypeAlias = Annotated[
    list[str] | None, typer.Option("--set", help="Any parameter of the method, as NAME=VALUE; may be repeated.")
]


def checkpoint_of(model: str) -> Path:
    """The directory that ``model`` names, for what reads weights; :class:`BadModel` for a package, which has none."""
    directory = DEMO if model == "demo" else Path(model)
    if is_package(directory):
        raise BadModel(f"{directory} is a package of avl-edge build: give the checkpoint that it was built from")
    return directory


def given_parameters(named: Mapping[str, float | None], texts: list[str] | None) -> dict[str, float]:
    """A method's parameters from options of their own and from ``--set``; :class:`BadInput` for one given twice."""
    given = {name: value for name, value in named.items() if value is not None}
    for name, value in map(parse_parameter, texts or []):
        if name in given:
            raise BadInput(f"{name!r} is given twice: keep one of them")
        given[name] = value
    return given


@contextmanager
def progress(title: str) -> Iterator[Report | None]:
    """A bar on stderr while something goes on; nothing when stderr is not a terminal."""
    if not stderr.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """End quietly when the other end of stdout's pipe was closed."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
