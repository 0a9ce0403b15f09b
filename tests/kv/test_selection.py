"""Selected rows: of one layer as a list, of all layers as they stand in their table."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_edge.kv.pool import RowTable, TieredTable
from avl_edge.kv.selection import ListedRows, Selected, Selection, StepScores, by_format

FORMATS = ("exact", "int8", "int4")


def _rows(format_: str, *ids: int) -> Selected:
    return Selected(format_, np.arange(len(ids)), np.array(ids, np.int32), np.array(ids, np.int32) + 100)


def test_lists_are_equal_where_they_are_the_same() -> None:
    one, other = by_format([_rows("exact", 1)], _rows("exact", 2)), by_format([_rows("exact", 1)], _rows("exact", 2))
    assert one[0] == one[0]
    assert one[0] != other[0]
    assert len({one[0], other[0], one[0]}) == 2


@pytest.mark.parametrize("rows", [_rows("int4", 4, 2), *by_format([_rows("int4", 4)], _rows("int4", 2))])
def test_the_same_rows_at_other_indices(rows: Selected) -> None:
    moved = rows.at(np.array([5, 6]))
    assert (moved.format, moved.order.tolist(), moved.ids.tolist()) == ("int4", [5, 6], [4, 2])
    assert moved.positions.tolist() == rows.positions.tolist() == [104, 102]
    for same in (copy.copy(rows), copy.deepcopy(rows), replace(rows, order=moved.order)):
        assert same.ids.tolist() == [4, 2]


def test_rows_by_format_put_images_before_text() -> None:
    exact, packed, text = _rows("exact", 1), _rows("int8", 2), _rows("exact", 3)
    found = by_format([exact, packed, _rows("int4")], text)
    assert [(each.format, each.ids.tolist()) for each in found] == [("exact", [1, 3]), ("int8", [2])]
    assert [(each.format, each.ids.tolist()) for each in by_format([packed], text)] == [("exact", [3]), ("int8", [2])]


def _read(data: st.DataObject, layers: int, number: int) -> tuple[list[Selection], TieredTable, RowTable]:
    """What some sequence reads: random rows in random tiers."""
    image, text = TieredTable(layers), RowTable(layers)
    for layer in range(layers):
        core = np.array(data.draw(st.lists(st.booleans(), max_size=9)), dtype=np.bool_)
        first, texts = 1000 * number + 100 * layer, data.draw(st.integers(0, 5))
        places = np.arange(len(core), dtype=np.int32)
        image.put_tiered(layer, places, first + places, core)
        text.put(layer, 50 + np.arange(texts, dtype=np.int32), first + 50 + np.arange(texts, dtype=np.int32))
    core_format, other, of_text = (data.draw(st.sampled_from(FORMATS)) for _ in range(3))
    kinds = ([Selection(core_format, image)], [Selection(core_format, image, True)])
    both = [Selection(core_format, image, True), Selection(other, image, False)]
    read = data.draw(st.sampled_from([*kinds, both] if other != core_format else list(kinds)))
    return [*read, Selection(of_text, text)], image, text


@given(data=st.data(), layers=st.integers(1, 3), batch=st.integers(1, 3))
def test_a_batch_is_listed_format_by_format(data: st.DataObject, layers: int, batch: int) -> None:
    """Each sequence's rows of a format by their positions; and scores find back to the rows that they are of."""
    made = [_read(data, layers, number) for number in range(batch)]
    reads = [read for read, *_ in made]
    scores = [StepScores(read, np.float32) for read in reads]
    for layer in range(layers):
        listed = ListedRows(reads, layer)
        held: list[dict[str, list[int]]] = [{} for _ in reads]
        for name, rows, offsets in listed.parts():
            for number in range(batch):
                held[number][name] = rows[offsets[number] : offsets[number + 1]].tolist()
        for read, lists in zip(reads, held, strict=True):
            expected: dict[str, list[int]] = {}
            for each in read:
                expected[each.format] = expected.get(each.format, []) + each.of(layer).ids.tolist()
            assert {name: ids for name, ids in lists.items() if ids} == {n: ids for n, ids in expected.items() if ids}
        for number, each in enumerate(scores):  # what a row received: its id
            listed.give(each, number, listed.rows[0].astype(np.float32))
    for (read, image, text), found in zip(made, scores, strict=True):
        for layer in range(layers):
            core, ids = image.core[layer, : image.counts[layer]], image.ids[layer, : image.counts[layer]]
            expected_ids = ids[core] if len(read) == 2 and read[0].tier else ids
            assert found.image[layer, : found.image_counts[layer]].tolist() == expected_ids.tolist()
            assert not found.image[layer, found.image_counts[layer] :].any()
            own = text.ids[layer, : text.counts[layer]].tolist()
            assert found.text[layer, : found.text_counts[layer]].tolist() == own
            assert not found.text[layer, found.text_counts[layer] :].any()
