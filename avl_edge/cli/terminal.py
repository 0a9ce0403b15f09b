"""What every command has: two options, and a reader of stdout that may leave."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, TypeAlias

import typer

BROKEN_PIPE = 128 + signal.SIGPIPE
AS_JSON = "Print one JSON document instead of text."

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help=AS_JSON)]
Debug: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]


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
