"""``python -m avl_edge``: the command line, where ``avl-edge`` is not on the path."""

from __future__ import annotations

from .cli import main

main()
