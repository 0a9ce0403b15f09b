"""A bounded process: its parts never add up to more, and the least that would do does, and nothing less."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_edge import TooLarge
from avl_edge.planning.process_memory import ProcessMemory

MB = 10**6
SIZES = st.integers(0, 2**34)
PROCESSES = st.builds(ProcessMemory, st.integers(1, 2**36), *[SIZES] * 5, st.integers(0, 2**24), SIZES)


@given(PROCESSES, SIZES, SIZES, st.integers(0, 2**28))
def test_the_least_that_would_do_does_and_one_byte_less_does_not(
    process: ProcessMemory, prompt: int, rows: int, pixels: int
) -> None:
    least = process.smallest(prompt, rows, pixels)
    enough = replace(process, limit=least)
    enough.require(prompt, rows, "it", pixels)
    limits = enough.limits(rows)
    assert sum(limits.values()) <= least
    assert limits["pixels"] >= pixels
    assert limits["activations"] >= process.conversions + prompt
    assert limits["kv_pool"] == rows
    with pytest.raises(TooLarge, match=rf"the smallest that would do is .*\({least} bytes\)"):
        replace(process, limit=least - 1).require(prompt, rows, "it", pixels)


@given(PROCESSES, SIZES)
def test_what_is_left_for_rows_is_what_can_be_held(process: ProcessMemory, prompt: int) -> None:
    left = process.kv_bytes(prompt)
    if left > 0:
        process.require(prompt, left, "it")
        limits = process.limits(left)
        assert sum(limits.values()) <= process.limit
        assert all(limit >= 0 for limit in limits.values())
    with pytest.raises(TooLarge):
        process.require(prompt, max(0, left + 1), "it")


def test_a_process_of_12_gb() -> None:
    """By hand: 12 GB less 9 GB that are fixed, 4 pictures of 1 MB and 24 MB of decoding is a room of 2,972 MB, of which
    features take 20 MB, pixels a sixteenth, decoding an eighth."""
    process = ProcessMemory(12_000 * MB, 1000 * MB, 900 * MB, 7000 * MB, 50 * MB, 50 * MB, MB, 20 * MB)
    room = 12_000 * MB - 9000 * MB - 4 * MB - 24 * MB
    left = room - 20 * MB - room // 16 - room // 8
    assert process.kv_bytes(400 * MB) == left - 400 * MB
    assert process.limits(1000 * MB) == {
        "process": 1000 * MB,
        "libraries": 900 * MB,
        "weights": 7000 * MB,
        "recorded_steps": 50 * MB,
        "features": 20 * MB,
        "pixels": 4 * MB + room // 16,
        "decoding": 24 * MB + room // 8,
        "kv_pool": 1000 * MB,
        "activations": 50 * MB + left - 1000 * MB,
    }
