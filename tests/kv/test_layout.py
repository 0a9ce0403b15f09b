"""Formats by name, what a row weighs in each, and how rows lie in a page."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_edge import BadInput, Formats
from avl_edge.config import KvShape
from avl_edge.kv.layout import PAGE_ROWS, UNIT, Format, check, groups, packing, page_bytes


@pytest.mark.parametrize(
    "name",
    ["exact", "int8", "int4", "lowrank:1", "lowrank:64", "lowrank:512+int8", "lowrank:64@16", "lowrank:8@8+int8"],
)
def test_names_of_formats(name: str) -> None:
    assert Formats(core=name, secondary=name).by_tier() == {"text": "exact", "core": name, "secondary": name}
    assert Format(name).is_exact == (name == "exact")
    assert (Format(name).rank is None) == (not name.startswith("lowrank"))


@pytest.mark.parametrize(
    "name",
    ["", "int9", "INT8", "int8 ", "exact+int8", "lowrank", "lowrank:", "lowrank:0", "lowrank:-3", "lowrank:a", 8],
)
@pytest.mark.parametrize("tier", ["text", "core", "secondary"])
def test_names_of_no_format_are_one_clear_line(tier: str, name: object) -> None:
    with pytest.raises(BadInput) as refusal:
        Formats(**{tier: name})  # type: ignore[arg-type]
    message = str(refusal.value)
    assert message.startswith(f"the {tier} format must be exact, int8, int4, lowrank:R")
    assert message.endswith(f"not {name!r}")
    assert "\n" not in message


def test_text_is_never_low_rank() -> None:
    with pytest.raises(BadInput, match="text rows cannot be low-rank: choose exact, int8 or int4"):
        Formats("lowrank:8", "lowrank:8", "lowrank:8")


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        (KvShape(2, 2, 15, 4), ("int8", "exact", "exact"), "heads of size 15 cannot be packed: it is odd"),
        (KvShape(2, 1, 16, 2), ("exact", "exact", "int8"), "the secondary format int8 would be no smaller"),
        (KvShape(2, 1, 8, 2), ("int4", "exact", "exact"), "the text format int4 would be no smaller"),
    ],
)
def test_rows_that_a_format_does_not_suit(shape: KvShape, names: tuple[str, str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check(Formats(*names), shape)
    check(Formats(), shape)


def test_sizes_of_records_by_hand() -> None:
    """LLaVA-1.5-7B in fp16: 8192 bytes of K; int8 2 bytes a head and one a value; int4 2 bytes for 32 values."""
    shape = KvShape(32, 32, 128, 2)
    assert (Format("int8").record_bytes(shape), Format("int4").record_bytes(shape)) == (64 + 4096, 256 + 2048)
    assert (Format("exact").coarse_bytes(shape), Format("int4").coarse_bytes(shape)) == (8192, 256 + 2048)
    assert Format("int8").coarse_bytes(shape) == 64 + 2048
    assert page_bytes(shape) == PAGE_ROWS * 2 * 8192
    assert [packing(Format(name), shape).rows for name in ("exact", "int8", "int4")] == [16, 31, 56]
    # Groups of what divides the head; sections in whole units.
    odd = KvShape(1, 3, 20, 4)
    assert groups(20) == 5
    assert (Format("int8").record_bytes(odd), Format("int4").record_bytes(odd)) == (16 + 2 * 32, 32 + 32)


@given(
    st.builds(
        KvShape, st.just(2), st.integers(1, 9), st.integers(1, 100).map(lambda half: 2 * half), st.sampled_from([2, 4])
    ),
    st.integers(1, 5),
)
def test_rows_of_a_format_never_overlap(shape: KvShape, pages: int) -> None:
    """The bytes of every slot of every page, in one arena: each within its own page, none twice."""
    half_page = page_bytes(shape) // 2
    for name in ("exact", "int8", "int4"):
        pack = packing(Format(name), shape)
        size = pack.row_bytes // 2
        unit = shape.row_bytes // 2 if name == "exact" else UNIT
        taken = np.zeros(pages * half_page, dtype=np.int64)
        for page in range(pages):
            for slot in range(pack.rows):
                begin = (page * pack.page_step + slot * pack.row_step) * unit
                assert page * half_page <= begin
                assert begin + size <= (page + 1) * half_page
                taken[begin : begin + size] += 1
        assert taken.max(initial=0) <= 1
        assert name == "exact" or size % UNIT == 0
        assert half_page - pack.rows * size < max(size, 1), "another row would fit"
        if name == "exact":
            assert taken.min() == 1
