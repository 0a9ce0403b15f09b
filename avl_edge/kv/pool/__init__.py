"""The tiered row pool, as arithmetic: it moves no bytes.

Who owns a row (`rows`), which tier it is in (`sequence`), who reads another's (`borrowing`), and how rows come to take
less (`compaction`).
"""

from .borrowing import BorrowingRows
from .rows import Lease, RowPool
from .sequence import Moved, SequenceRows

__all__ = ["BorrowingRows", "Lease", "Moved", "RowPool", "SequenceRows"]
