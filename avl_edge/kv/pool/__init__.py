"""The tiered row pool.

Who owns a row (`rows`), which tier it is in (`sequence`), who reads another's (`borrowing`), how rows come to take less
(`smaller`), their bytes in each format (`formats`) and where they lie (`store`).
"""

from .borrowing import BorrowingRows
from .rows import Lease, RowPool
from .sequence import Moved, SequenceRows
from .store import RowStore

__all__ = ["BorrowingRows", "Lease", "Moved", "RowPool", "RowStore", "SequenceRows"]
