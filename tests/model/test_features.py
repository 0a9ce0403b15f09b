"""Features are kept by their bytes: the least recently used go first, and what was just kept stays."""

from __future__ import annotations

from collections import OrderedDict

import torch
from hypothesis import given
from hypothesis import strategies as st

from avl_edge.machine.ledger import Entry
from avl_edge.model.features import FeatureCache
from avl_edge.request import ImageSpan, Prompt

LIMIT = 64


def _prompt(name: str) -> Prompt:
    return Prompt((), (ImageSpan(name, 0, 1),), None)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 20), st.booleans()), max_size=40))
def test_the_cache_equals_a_list_in_order_of_use(calls: list[tuple[str, int, bool]]) -> None:
    entry = Entry("features", LIMIT)
    cache, expected = FeatureCache(entry), OrderedDict[str, torch.Tensor]()
    for name, count, finds in calls:
        if finds:
            assert cache.find(_prompt(name)) is expected.get(name)
            continue
        features = torch.zeros(count)
        cache.keep(_prompt(name), features)
        expected.pop(name, None)
        if 4 * count <= LIMIT:
            expected[name] = features
        while sum(each.nbytes for each in expected.values()) > LIMIT:
            expected.popitem(last=False)
        assert entry.used == sum(each.nbytes for each in expected.values()) <= LIMIT
        for other in "abcdef":
            assert cache.find(_prompt(other)) is expected.get(other)
        if 4 * count <= LIMIT:
            assert cache.find(_prompt(name)) is features, "what is used now is not given up for itself"
    cache.forget()
    assert entry.used == 0
    assert all(cache.find(_prompt(name)) is None for name in "abcdef")


def test_without_a_limit_all_are_kept() -> None:
    cache = FeatureCache(Entry("features"))
    for name in "abcdefgh":
        cache.keep(_prompt(name), torch.zeros(1000))
    assert all(cache.find(_prompt(name)) is not None for name in "abcdefgh")
