"""How much memory a run leaves to other processes."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from ..config import parse_size
from ..machine import device, profile
from ..machine.profile import BadProfile
from ..request import PressureStats
from .options import MEMORY
from .profiles import of_machine

Reserve: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Memory to leave to others, like 2GB, or off: when they need it, rows are packed, then dropped, then "
        "requests wait.",
        show_default="the profile's reserve, where one is for this machine",
        rich_help_panel=MEMORY,
    ),
]


def reserve_bytes(given: str | None) -> int | None:
    """Bytes of ``--reserve``; None where it is off, or not given and no profile is for this machine.

    By default what the profile keeps for others, but no more than the tenth of what is available now: a run should not
    begin by waiting for itself.
    """
    if given is not None:
        return None if given.strip().lower() == "off" else parse_size(given)
    facts = device.read_machine()
    try:
        found = of_machine(facts)
    except BadProfile:
        return None
    now = profile.with_memory(found, facts)
    return min(int(found.memory.reserve_bytes.value), int(now.memory.reserve_bytes.value))


def spoken(pressure: PressureStats) -> str:
    """``2 demotions, 96 rows evicted, 1.2 MB given back, waited 250 ms``: what there was of it."""
    parts = (
        (pressure.demotions, f"{pressure.demotions} demotions"),
        (pressure.rows_evicted, f"{pressure.rows_evicted} rows evicted"),
        (pressure.bytes_given_back, f"{pressure.bytes_given_back / 1e6:.1f} MB given back"),
        (pressure.waited_ms, f"waited {pressure.waited_ms:.0f} ms"),
    )
    return ", ".join(text for amount, text in parts if amount)
