"""Consoles of rich: what goes to stderr while a command computes, and tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from ..config import Progress

stderr = Console(stderr=True, highlight=False)


class Paper(Console):
    """stdout for tables. Its base ends the process when a reader has left."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


@contextmanager
def progress(title: str) -> Iterator[Progress | None]:
    """A bar on stderr while something goes on; nothing when stderr is not a terminal."""
    if not stderr.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
