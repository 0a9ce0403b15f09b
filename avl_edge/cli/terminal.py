"""What the commands share: options, the progress bar, and a reader that leaves."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, TypeAlias

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..checkpoint import Progress as Report

BROKEN_PIPE = 128 + signal.SIGPIPE

stderr = Console(stderr=True, highlight=False)

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Debug: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
Model: TypeAlias = Annotated[str, typer.Option(help="'demo', or the directory of a LLaVA-1.5 checkpoint.")]


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
