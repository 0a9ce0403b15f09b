"""Which bytes of a pool's memory a row takes, both arenas as one: said once more, by what a row weighs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from avl_edge.kv.layout import UNIT, Format
from avl_edge.kv.pool import RowPool


def row_bytes(pool: RowPool, ids: npt.NDArray[np.int32], format_: str) -> npt.NDArray[np.int64]:
    """The bytes of rows ``[n, bytes of a row]``: an exact one by its number, a packed one from where it begins: its
    key in one arena, its value in the other, which lies behind it; or of a mixed format both in a row."""
    half_row, form = pool.shape.row_bytes // 2, Format(format_)
    unit = half_row if form.is_exact else UNIT
    if form.is_mixed:
        own = np.arange(form.keys.record_bytes(pool.shape) + form.values.record_bytes(pool.shape))
    else:
        key = np.arange(half_row if form.is_exact else form.record_bytes(pool.shape))
        own = np.concatenate([key, key + pool.pages * pool.page_bytes // 2])
    return ids.astype(np.int64)[:, None] * unit + own
