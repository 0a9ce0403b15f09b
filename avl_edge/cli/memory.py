"""``--max-memory``: the most that the process may take, and what it took."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import typer

from ..config import format_size
from ..machine.ledger import MemoryStats
from .options import MEMORY


def _max_memory(default: str) -> Any:
    """The option, where ``default`` bounds a process that it does not."""
    return typer.Option(
        help="The most memory for the whole process, like 12GB.", show_default=default, rich_help_panel=MEMORY
    )


MaxMemory: TypeAlias = Annotated[str | None, _max_memory("no bound but the machine's")]
MaxPlannedMemory: TypeAlias = Annotated[str | None, _max_memory("what the device has")]


def spoken(stats: MemoryStats) -> str:
    """``process 253 MB, weights 16 MB, ..., 395 MB of 500 MB``: the most that each entry held, as it was counted."""
    parts = [
        f"{name.replace('_', ' ')} {format_size(entry.peak)}" for name, entry in stats.entries.items() if entry.peak
    ]
    most = format_size(sum(entry.peak for entry in stats.entries.values()))
    return ", ".join([*parts, f"{most} in all" if stats.limit is None else f"{most} of {format_size(stats.limit)}"])
