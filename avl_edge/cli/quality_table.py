"""The table of an evaluation on questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ..config import format_size


def quality_table(document: Mapping[str, Any]) -> Table:
    """A row per setting; columns that nobody asked for are left out."""
    title = f"{document['data']}: {document['questions']} questions, {document['metric'].replace('_', ' ')}"
    rows = [_cells(row) for row in document["results"]]
    columns = [name for name in rows[0] if any(cells[name] != _UNKNOWN for cells in rows)]
    notes = {"same": "tokens as full's", "KL": "from full's", "read": "of full's bytes a step"}
    note = "; ".join(f"{name}: {text}" for name, text in notes.items() if name in columns)
    table = Table(title=title, caption=note, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(
            name, justify="left" if name == "method" else "right", no_wrap=name != "method", overflow="fold"
        )
    for cells in rows:
        table.add_row(*(cells[name] for name in columns))
    return table


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    interval = row["score_interval"]
    return {
        "method": row["method"],
        "KV": f"{row['kv_fraction']:.1%}",
        "score": f"{row['score']:.3f}",
        "95 %": "{:.2f}..{:.2f}".format(*interval) if interval else _UNKNOWN,
        "CER": f"{row['character_error_rate']:.3f}",
        "same": _known(row["token_identity"], ".1%"),
        "KL": _known(row["kl_to_full"], ".4f"),
        "stored": format_size(round(row["bytes_stored"])),
        "read": _known(row["bytes_read_fraction"], ".1%"),
        "ms/token": _known(row["ms_per_token"], ".2f"),
    }


_UNKNOWN = "-"


def _known(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else format(value, form)
