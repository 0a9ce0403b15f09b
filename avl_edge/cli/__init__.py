"""The command line: parse, translate, print. One file a command, imported when it is called (`commands`); what they
share is in `terminal`, `options`, `profiles` and `progress`.

stdout holds the answer and nothing else. Exit codes: 0 done, 1 our fault (or a check of the doctor's that failed),
2 bad input, 3 does not fit (the budget, the pool, the model's context), 130 Ctrl-C, 141 the reader of stdout left.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from ..errors import MESSAGE_LENGTH, AvlEdgeError, BadInput, reason, shortened
from .commands import LazyGroup
from .terminal import INTERRUPTED, Debug, quit_at_once

app = typer.Typer(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> NoReturn:
    """The console script."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, quit_at_once)
    if sys.stdout is None:
        print("avl-edge: stdout is closed: send it somewhere, such as > /dev/null", file=sys.stderr)
        sys.exit(BadInput.exit_code)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding does not
    sys.exit(run_app(sys.argv[1:]))


def run_app(arguments: list[str]) -> int:
    """Run a command line and give its exit code."""
    try:
        return app(arguments, standalone_mode=False, prog_name="avl-edge") or 0
    except typer.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        message, code = _explained(error)
        if "--debug" in arguments:
            traceback.print_exception(error)
        else:
            print(f"avl-edge: {message}", file=sys.stderr)
        return code


def _explained(error: Exception) -> tuple[str, int]:
    """One line for the person who meets ``error``, and its exit code."""
    if isinstance(error, AvlEdgeError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"{shortened(repr(os.fspath(error.filename)), MESSAGE_LENGTH)} cannot be used: {reason(error)}", 2
    if hasattr(error, "format_message"):  # Typer's own usage errors
        return f"{shortened(error.format_message(), MESSAGE_LENGTH)} (see --help)", 2
    said = shortened(str(error), MESSAGE_LENGTH)
    return f"internal error: {type(error).__name__}: {said} (run again with --debug for the trace)", 1


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"avl-edge {version('avl-edge')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Debug = False,
) -> None:
    """Ask questions about images, inside a memory budget.

    COMMAND --help says more. Completion of commands and options by the shell: --install-completion.
    """
