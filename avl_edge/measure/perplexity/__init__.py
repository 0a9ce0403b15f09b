"""Perplexity of any text, by the runtime's own decode path: what a method and a format cost on real text."""

from .report import report
from .run import Scores, compare, measure, plans_of
from .windows import HEADER, TEXT, Window, WindowLayout, files_of, read_windows

__all__ = [
    "HEADER",
    "TEXT",
    "Scores",
    "Window",
    "WindowLayout",
    "compare",
    "files_of",
    "measure",
    "plans_of",
    "read_windows",
    "report",
]
