"""Lists of selected rows: several of one format read as one, joined only where somebody asks."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from avl_edge.kv.selection import Concatenated, Selected, by_format


def _rows(format_: str, *ids: int) -> Selected:
    return Selected(format_, np.arange(len(ids)), np.array(ids, np.int32), np.array(ids, np.int32) + 100)


def test_several_lists_are_read_as_one() -> None:
    first, second = _rows("exact", 7, 3), _rows("exact", 9)
    both = Concatenated([first, second])
    assert (both.format, len(both), list(both.parts)) == ("exact", 3, [first, second])
    assert both.order.tolist() == [0, 1, 0]
    assert both.ids.tolist() == [7, 3, 9]
    assert both.positions.tolist() == [107, 103, 109]
    assert both.ids is both.ids, "joined once"


def test_lists_are_equal_where_they_are_the_same() -> None:
    pairs = [(_rows("exact", 1), _rows("exact", 1)), (Concatenated([_rows("exact", 1)]), Concatenated([_rows("int8")]))]
    for one, other in pairs:
        assert one == one
        assert one != other
        assert len({one, other, one}) == 2


@pytest.mark.parametrize("rows", [_rows("int4", 4, 2), Concatenated([_rows("int4", 4), _rows("int4", 2)])])
def test_the_same_rows_at_other_indices(rows: Selected) -> None:
    moved = rows.at(np.array([5, 6]))
    assert (moved.format, moved.order.tolist(), moved.ids.tolist()) == ("int4", [5, 6], [4, 2])
    assert moved.positions.tolist() == rows.positions.tolist() == [104, 102]
    assert copy.copy(rows).ids.tolist() == [4, 2]


def test_an_unknown_attribute_is_none() -> None:
    with pytest.raises(AttributeError, match="'idx'"):
        getattr(Concatenated([_rows("exact", 1)]), "idx")  # noqa: B009


def test_rows_by_format_put_images_before_text() -> None:
    exact, packed, text = _rows("exact", 1), _rows("int8", 2), _rows("exact", 3)
    found = by_format([exact, packed, _rows("int4")], text)
    assert [(each.format, each.ids.tolist()) for each in found] == [("exact", [1, 3]), ("int8", [2])]
    assert by_format([packed], text) == [text, packed]
