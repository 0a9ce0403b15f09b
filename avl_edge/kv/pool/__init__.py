"""The tiered row pool, as arithmetic: it moves no bytes.

Who owns a row (`rows`), which rows a layer has (`table`) and in which tier (`sequence`), who reads another's
(`borrowing`), and how rows come to take less (`compaction`).
"""

from .borrowing import BorrowingRows
from .rows import Lease, RowPool
from .sequence import Moved, SequenceRows
from .table import RowTable, TieredTable

__all__ = ["BorrowingRows", "Lease", "Moved", "RowPool", "RowTable", "SequenceRows", "TieredTable"]
