"""What every command has: two options, and a stdout that may end before it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn, TypeAlias

import typer

from ..errors import BadInput

BROKEN_PIPE = 128 + signal.SIGPIPE
INTERRUPTED = 128 + signal.SIGINT
AS_JSON = "Print one JSON document instead of text."

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help=AS_JSON)]
Debug: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]


def quit_at_once(*_: object) -> NoReturn:
    """For Ctrl-C while a command is imported: libraries that are interrupted there fail in ways of their own."""
    os._exit(INTERRUPTED)


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """End quietly when the other end of stdout's pipe was closed; :class:`BadInput` when stdout takes no more for
    another reason, a full disk for example."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_stdout()
        raise typer.Exit(BROKEN_PIPE) from None
    except OSError as error:
        if error.filename is not None:  # of a file
            raise
        _leave_stdout()
        raise BadInput(f"the output cannot be written: {error.strerror}") from None


def _leave_stdout() -> None:
    """Python would complain once more when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
