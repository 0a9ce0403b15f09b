"""What policies count and rank by."""

from __future__ import annotations

import math
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from avl_edge.kv.methods.arithmetic import rounded_share, share, top

SCORES = st.one_of(st.sampled_from([0.0, -0.0, 0.25, 0.5, math.inf, -math.inf, math.nan]), st.floats(width=32))


@given(scores=st.lists(SCORES, max_size=40), count=st.integers(0, 45))
def test_top_ranks_by_score_then_position(scores: list[float], count: int) -> None:
    """Also among many equals, and where an overflow left no numbers: those come last."""
    order = sorted(
        range(len(scores)), key=lambda at: (math.isnan(scores[at]), -scores[at] if scores[at] == scores[at] else 0, at)
    )
    found = top(np.array(scores, dtype=np.float32), count)
    assert np.flatnonzero(found).tolist() == sorted(order[:count])


@given(count=st.integers(0, 100_000), tenths=st.integers(0, 1000))
def test_shares_are_of_the_decimal_number_that_was_written(count: int, tenths: int) -> None:
    whole = Decimal(count) * Decimal(tenths) / 1000
    assert share(count, tenths / 10) == int(whole.to_integral_value(ROUND_FLOOR))
    assert rounded_share(count, tenths / 10) == int(whole.to_integral_value(ROUND_HALF_EVEN))
