"""Perplexity of any text, by the runtime's own decode path: what a method and a format cost on real text."""

from .report import report
from .run import Scores, measure, plans_of
from .windows import HEADER, TEXT, Window, WindowLayout, read_windows

__all__ = ["HEADER", "TEXT", "Scores", "Window", "WindowLayout", "measure", "plans_of", "read_windows", "report"]
