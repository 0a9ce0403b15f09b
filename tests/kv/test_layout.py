"""Formats by name, what a row weighs in each, and how rows lie in a page."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_edge import BadInput, Formats
from avl_edge.config import KvShape
from avl_edge.kv.layout import PAGE_ROWS, UNIT, Format, check, groups, packing, page_bytes
from avl_edge.kv.pool import RowPool


@pytest.mark.parametrize(
    "name",
    [
        "exact",
        "int8",
        "int8/int4",
        "int4",
        "lowrank:1",
        "lowrank:64",
        "lowrank:512+int8",
        "lowrank:64@16",
        "lowrank:8@8+int8",
    ],
)
def test_names_of_formats(name: str) -> None:
    assert Formats(core=name, secondary=name).by_tier() == {"text": "exact", "core": name, "secondary": name}
    assert Format(name).is_exact == (name == "exact")
    assert (Format(name).rank is None) == (not name.startswith("lowrank"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int9",
        "INT8",
        "int8 ",
        "exact+int8",
        "lowrank",
        "lowrank:",
        "lowrank:0",
        "lowrank:-3",
        "lowrank:a",
        "int4/int8",
        "int8/",
        8,
    ],
)
@pytest.mark.parametrize("tier", ["text", "core", "secondary"])
def test_names_of_no_format_are_one_clear_line(tier: str, name: object) -> None:
    with pytest.raises(BadInput) as refusal:
        Formats(**{tier: name})  # type: ignore[arg-type]
    message = str(refusal.value)
    assert message.startswith(f"the {tier} format must be one of exact, int8, int8/int4, int4, ")
    assert message.endswith(f"not {name!r}")
    assert "\n" not in message


def test_text_is_never_low_rank() -> None:
    with pytest.raises(BadInput, match="text rows cannot be low-rank: choose exact, int8, int8/int4 or int4"):
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
    assert Format("int8").coarse_bytes(shape) == Format("int8/int4").coarse_bytes(shape) == 64 + 2048
    mixed = packing(Format("int8/int4"), shape)
    assert (mixed.row_bytes, mixed.rows) == (64 + 4096 + 256 + 2048, 2 * 20)
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
    st.sampled_from(["exact", "int8", "int8/int4", "int4", "lowrank:2+int8"]),
)
def test_rows_of_a_format_never_overlap(shape: KvShape, pages: int, name: str) -> None:
    """The bytes of every slot of every page, keys and values: each within its own page, none twice.

    The pool's memory is the keys' arena, then that of the values; a page is a piece of each.
    """
    half_page, form = page_bytes(shape) // 2, Format(name)
    pack = packing(form, shape, pages)
    sides = [shape.row_bytes // 2] * 2 if form.is_exact else [f.record_bytes(shape) for f in (form.keys, form.values)]
    assert sum(sides) == pack.row_bytes
    page, slot = (each.flatten() for each in np.indices((pages, pack.rows)))
    ids = pack.ids(page, slot)
    assert all(map(np.array_equal, pack.places(ids), (page, slot)))
    begins = ids * (shape.row_bytes // 2 if form.is_exact else UNIT)
    taken = np.zeros(2 * pages * half_page, dtype=np.int64)
    behind = sides[0] if form.is_mixed else pages * half_page
    for side, size in zip((begins, begins + behind), sides, strict=True):
        first, last = side // half_page, (side + size - 1) // half_page
        assert np.array_equal(first, last)
        assert np.array_equal(first % pages, page)
        for begin in side.tolist():
            taken[begin : begin + size] += 1
    assert taken.max(initial=0) <= 1
    free = half_page - taken.reshape(2, pages, half_page).sum(2)
    assert (free < (pack.row_bytes if form.is_mixed else max(sides))).all(), "another row would fit"
    assert form.is_exact or not any(size % UNIT for size in sides)
    assert not form.is_exact or not free.any()


def test_a_pool_whose_ids_are_no_int32_is_refused() -> None:
    """Ids of packed rows count units of 16 bytes in one arena, of mixed ones in both."""
    shape = KvShape(layers=32, kv_heads=8, head_dim=128, itemsize=2)
    pages = 2**31 * 16 // page_bytes(shape)
    for name, most in (("int8/int4", pages), ("int8", 2 * pages)):
        pack = packing(Format(name), shape, most)
        last = pack.ids(np.array([most - 1]), np.array([pack.rows - 1]))
        assert last.astype(np.int32) == last
        assert pack.places(last) == (most - 1, pack.rows - 1)
        pool = RowPool(most, shape)
        assert pool.allocate(2, pool.lease(1), name).tolist() == [0, pack.row_step]
    for name, most in (("int8/int4", pages), ("int8", 2 * pages)):
        with pytest.raises(BadInput, match="load with half of it"):
            packing(Format(name), shape, most + 1)
