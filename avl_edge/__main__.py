"""The console script, and ``python -m avl_edge``, where that is not on the path."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from typing import NoReturn


def main() -> NoReturn:
    """Ready for Ctrl-C before it imports: see :func:`avl_edge.cli.terminal.quit_at_once`."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    import_module("avl_edge.cli").main()
    raise AssertionError("it exits")


if __name__ == "__main__":
    main()
