"""The per-layer tiered row pool: who owns a row (`rows`) and where its bytes lie (`store`)."""

from .rows import Lease, RowPool, SequenceRows
from .store import RowStore

__all__ = ["Lease", "RowPool", "RowStore", "SequenceRows"]
