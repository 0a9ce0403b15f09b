"""The tiered row pool: who owns a row (`rows`), its bytes in each format (`formats`) and where they lie (`store`)."""

from .rows import Lease, Moved, RowPool, SequenceRows
from .store import RowStore

__all__ = ["Lease", "Moved", "RowPool", "RowStore", "SequenceRows"]
