"""The command line: parse, translate, print. One file a command; what they share is in `terminal`.

stdout holds the answer and nothing else. Exit codes: 0 done, 1 our fault (or a check of the doctor's that failed),
2 bad input, 3 does not fit the budget, 130 Ctrl-C, 141 the reader of stdout left.
"""

from __future__ import annotations

import io
import signal
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from ..errors import AvlEdgeError
from .bench import app as bench_app
from .build import build
from .doctor import doctor
from .evaluate import evaluate
from .methods import methods
from .plan import plan
from .profile import app as profile_app
from .run import run

INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(run)
app.command()(doctor)
app.command()(plan)
app.command()(methods)
app.add_typer(profile_app, name="profile")
app.command("eval")(evaluate)
app.command()(build)
app.add_typer(bench_app, name="bench")


def main() -> NoReturn:
    """The console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding does not
    sys.exit(run_app(sys.argv[1:]))


def run_app(arguments: list[str]) -> int:
    """Run a command line and give its exit code."""
    debug = "--debug" in arguments
    try:
        return app(arguments, standalone_mode=False, prog_name="avl-edge") or 0
    except typer.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    """One line on stderr for ``error``, and its exit code."""
    if isinstance(error, AvlEdgeError):
        message, code = str(error), error.exit_code
    elif hasattr(error, "format_message"):  # Typer's own usage errors
        message, code = f"{error.format_message()} (see --help)", 2
    else:
        message, code = f"internal error: {type(error).__name__}: {error} (run again with --debug for the trace)", 1
    print(f"avl-edge: {message}", file=sys.stderr)
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"avl-edge {version('avl-edge')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Ask questions about images, inside a memory budget."""
