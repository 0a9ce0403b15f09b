"""What a cache holds, said as the oracles say it."""

from __future__ import annotations

from typing import Any

from tests.equipment.oracle import LayerRows


def held_rows(cache: Any) -> list[LayerRows]:
    """The positions in each tier of each layer."""
    return [
        LayerRows(
            tuple(rows.text_positions.tolist()),
            tuple(rows.image_positions[rows.core].tolist()),
            tuple(rows.image_positions[~rows.core].tolist()),
        )
        for rows in cache.rows.layers
    ]
