"""Entries never hold more than their limits, whoever holds and lets go, and say what they hold."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_edge import Busy, TooLarge
from avl_edge.machine.ledger import Entry, Ledger

HOLDERS = st.sampled_from("abcd")


@given(st.integers(0, 100), st.integers(0, 40), st.lists(st.tuples(HOLDERS, st.none() | st.integers(0, 120))))
def test_an_entry_equals_a_sum_that_refuses(limit: int, fixed: int, calls: list[tuple[str, int | None]]) -> None:
    entry, held, peak = Entry("things", limit + fixed), dict[str, int](), fixed
    entry.fixed = fixed
    for holder, amount in calls:
        if amount is None:
            entry.release(holder)
            held.pop(holder, None)
        elif sum({**held, holder: amount}.values()) <= limit:
            entry.hold(holder, amount, "it")
            held[holder] = amount
            peak = max(peak, fixed + sum(held.values()))
        else:
            with pytest.raises(TooLarge if amount > limit else Busy):
                entry.hold(holder, amount, "it")
        assert entry.used == fixed + sum(held.values()) <= limit + fixed
        assert (entry.stats.used, entry.stats.peak, entry.stats.limit) == (entry.used, peak, limit + fixed)
        assert all(entry.fits(more) == (entry.used + more <= limit + fixed) for more in (0, 1, limit, limit + 1))


def test_refusals_say_what_for_and_what_to_do() -> None:
    entry = Entry("pixels", 100)
    entry.hold("a", 60, "one picture")
    with pytest.raises(Busy, match=r"no room now for one picture \(50 B\): of 100 B for pixels others hold 60 B; ask"):
        entry.hold("b", 50, "one picture")
    with pytest.raises(
        TooLarge, match=r"no room for two pictures \(101 B\): 100 B are all .* for pixels; ask for less"
    ):
        entry.hold("b", 101, "two pictures")
    assert entry.used == 60


def test_threads_that_compete_are_never_both_served() -> None:
    """Six of ten bytes are one thread's at a time; the others are refused."""
    entry, served, failures, start = Entry("things", 10), set[int](), list[str](), threading.Barrier(4)
    inside = list[int]()

    def compete(number: int) -> None:
        start.wait()
        for turn in range(2_000):
            try:
                entry.hold((number, turn), 6, "it")
            except Busy:
                continue
            inside.append(number)
            if len(inside) > 1:
                failures.append(f"{inside} at once")
            served.add(number)
            inside.remove(number)
            entry.release((number, turn))

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert served
    assert (entry.used, entry.peak) == (0, 6)


def test_the_limits_of_a_ledger_never_exceed_the_process() -> None:
    ledger = Ledger(100)
    with pytest.raises(TooLarge):
        ledger["weights"].hold("weights", 1, "the model")
    ledger.divide({"weights": 60, "kv_pool": 40})
    with pytest.raises(ValueError, match="exceed the 100 bytes"):
        ledger.divide({"features": 1})
    assert ledger["features"].limit == 0
    ledger.divide({"weights": 50, "features": 10})
    ledger["weights"].hold("weights", 50, "the model")
    stats = ledger.stats
    assert (stats.limit, stats.used) == (100, 50)
    assert sum(entry.limit or 0 for entry in stats.entries.values()) == 100


def test_without_a_limit_nothing_is_refused() -> None:
    ledger = Ledger()
    ledger["pixels"].hold("a", 2**60, "pictures")
    assert ledger["pixels"].fits(2**60)
    assert ledger.stats.limit is ledger.stats.entries["pixels"].limit is None
