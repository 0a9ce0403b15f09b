"""What guards a pool's memory against faults of its callers raises, ``python -O`` or not."""

from __future__ import annotations

import numpy as np
import pytest

from avl_edge.config import Formats, KvShape
from avl_edge.errors import Busy, PoolExhausted
from avl_edge.kv.layout import PAGE_ROWS
from avl_edge.kv.pool import RowPool
from avl_edge.kv.pool.borrowing import BorrowingRows
from avl_edge.kv.pool.sequence import SequenceRows

SHAPE = KvShape(1, kv_heads=2, head_dim=16, itemsize=2)


def test_guard_of_a_pool_and_its_leases() -> None:
    pool = RowPool(10, SHAPE)
    lease = pool.lease(4)
    with pytest.raises(Busy, match="7 pages were asked of a pool with 6 to give"):
        pool.lease(7)
    with pytest.raises(PoolExhausted, match="5 pages exceed a lease of 4"):
        pool.allocate(4 * PAGE_ROWS + 1, lease)
    assert lease.held == 0


def test_guard_of_a_lease_that_shrinks() -> None:
    pool = RowPool(10, SHAPE)
    lease = pool.lease(4)
    pool.allocate(PAGE_ROWS + 1, lease)
    for limit in (1, 5):
        with pytest.raises(PoolExhausted, match=rf"a lease of 4 pages that holds 2 cannot become one of {limit}"):
            pool.shrink_lease(lease, limit)
    assert (lease.limit, pool.pages_unreserved) == (4, 6)
    pool.shrink_lease(lease, 2)
    assert pool.pages_unreserved == 8


def test_guard_of_borrowed_rows() -> None:
    pool = RowPool(10, SHAPE)
    lender = SequenceRows(pool, 1, 4, Formats())
    image, text = np.arange(2, 6), np.array([0, 1])
    lender.fill(0, text, image, np.ones(4, dtype=bool), 0)
    rows = BorrowingRows(lender, 6, 2)
    with pytest.raises(PoolExhausted, match="keeps all of them"):
        rows.fill(0, np.array([0, 1, 6]), image[1:], np.ones(3, dtype=bool), 0)
    rows.fill(0, np.array([0, 1, 6]), image, np.ones(4, dtype=bool), 0)
    with pytest.raises(PoolExhausted, match="not this sequence's to free"):
        rows.keep_image(np.array([[True, True, False, True]]))
    assert len(lender.layers[0].image_ids) == 4
