"""``avl-edge models``"""

from __future__ import annotations

import json
from typing import Any

from ..config import format_size
from ..model.known import KNOWN
from ..model.sizes import ModelShape
from .terminal import AsJson, Debug, readers_may_leave

PICTURE = (1280, 960)
"""Width and height in pixels of the picture whose image tokens are listed: the camera that plan assumes."""


def models(
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """List the models that plan knows by name: what they weigh, and what a token and a picture of theirs take.

    Weights and rows are counted in the format of the published checkpoints, 16 bits.
    """
    rows = [_facts(shape) for shape in KNOWN.values()]
    with readers_may_leave():
        print(json.dumps({"picture": PICTURE, "models": rows}) if as_json else _table(rows))


def _facts(shape: ModelShape) -> dict[str, Any]:
    kv = shape.kv_shape()
    return {
        "name": shape.name,
        "parameters": shape.parameters,
        "weight_bytes": shape.weight_bytes(shape.stored),
        "kv_bytes_per_token": kv.layers * kv.row_bytes,
        "image_tokens": shape.picture(*PICTURE).tokens,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    width, height = PICTURE
    widest = max(len(row["name"]) for row in rows)
    lines = [f"{'model':<{widest}}  parameters  weights  KV per token  tokens of {width}x{height}"]
    for row in rows:
        sizes = f"{format_size(row['weight_bytes']):>7}  {format_size(row['kv_bytes_per_token']):>12}"
        lines.append(f"{row['name']:<{widest}}  {row['parameters'] / 1e9:8.2f} B  {sizes}  {row['image_tokens']:>9}")
    return "\n".join(lines)
