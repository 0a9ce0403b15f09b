"""Sizes, and the arithmetic from a budget to a method."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.config import Formats, KvShape, PromptShape, format_size, parse_size
from avl_edge.errors import BadInput, DoesNotFit
from avl_edge.kv.budget import fit
from avl_edge.kv.layout import PAGE_ROWS, page_bytes
from avl_edge.kv.methods import METHODS, Avl, Choice, Full, candidates
from avl_edge.kv.quality import choices

SHAPE = KvShape(layers=4, kv_heads=2, head_dim=16, itemsize=2)


def _full_bytes(prompt: PromptShape, steps: int) -> int:
    """Full attention in the model's dtype, in whole pages."""
    rows = SHAPE.layers * (prompt.length + steps)
    return -(-rows // PAGE_ROWS) * PAGE_ROWS * SHAPE.row_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("160MB", 160_000_000),
        ("1.5GiB", 1_610_612_736),
        ("4096", 4096),
        ("4096B", 4096),
        ("2 kB", 2000),
        ("2kib", 2048),
        ("3 MiB", 3_145_728),
        ("1gb", 1_000_000_000),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1e9", "12 parsecs", "1,5GB", "nan", "0x10"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="like 160MB"):
        parse_size(text)


@given(st.integers(0, 10**15))
def test_sizes_for_people_are_close(count: int) -> None:
    assert parse_size(format_size(count)) == pytest.approx(count, rel=0.06, abs=1)


_prompts = st.builds(PromptShape, st.integers(0, 60), st.integers(1, 600), st.integers(1, 80))
_fixed = st.fixed_dictionaries(
    {},
    optional={
        "core": st.integers(1, 20),
        "text_keep": st.integers(20, 100),
        "prefill_keep": st.integers(30, 100),
        "refresh": st.integers(0, 9),
    },
)


_names = st.sampled_from(["exact", "int8", "int8/int4", "int4"])
_formats = st.one_of(st.just(Formats()), st.builds(Formats, _names, _names, _names))


@settings(deadline=None)
@given(prompt=_prompts, steps=st.integers(0, 300), share=st.floats(0.02, 1.2), fixed=_fixed, formats=_formats)
def test_a_fit_keeps_the_budget_and_a_refusal_names_the_smallest(
    prompt: PromptShape, steps: int, share: float, fixed: dict[str, float], formats: Formats
) -> None:
    budget = int(share * _full_bytes(prompt, steps)) + 1
    try:
        plan = fit(candidates("avl", fixed, True, formats), SHAPE, prompt, steps, budget)
    except DoesNotFit as refusal:
        smallest = int(str(refusal).split("would do is ")[1].split("(")[1].split(" bytes")[0])
        assert smallest > budget
        assert fit(candidates("avl", fixed, True, formats), SHAPE, prompt, steps, smallest).peak_bytes == smallest
        with pytest.raises(DoesNotFit):
            fit(candidates("avl", fixed, True, formats), SHAPE, prompt, steps, smallest - 1)
    else:
        assert plan.peak_bytes <= budget
        assert plan.peak_bytes == plan.pages * page_bytes(SHAPE)
        assert plan.formats == formats
        assert {name: getattr(plan.method, name) for name in fixed} == fixed
        assert isinstance(plan.method, Avl)


@settings(deadline=None)
@given(prompt=_prompts, steps=st.integers(0, 300), low=st.floats(0.3, 1.0), more=st.floats(0, 0.5))
def test_a_larger_budget_never_stores_less(prompt: PromptShape, steps: int, low: float, more: float) -> None:
    full = _full_bytes(prompt, steps)
    stored = []
    for budget in (int(full * low), int(full * (low + more))):
        try:
            stored.append(fit(candidates("avl", {}, True), SHAPE, prompt, steps, budget).peak_bytes)
        except DoesNotFit:
            stored.append(0)
    assert stored[0] <= stored[1]


def test_full_attention_is_taken_where_it_fits() -> None:
    prompt = PromptShape(30, 576, 20)
    full = _full_bytes(prompt, 9)
    plan = fit(choices(None, {}, True, None, SHAPE), SHAPE, prompt, 9, full)
    assert (plan.method, plan.formats) == (Full(), Formats())
    less = fit(choices(None, {}, True, None, SHAPE), SHAPE, prompt, 9, full - 1)
    assert (less.method, less.formats) != (Full(), Formats())
    assert less.peak_bytes < full


@pytest.mark.parametrize("name", [None, "full", "avl", "coarse"])
def test_formats_that_were_asked_for_stay(name: str | None) -> None:
    """Whatever the budget: what was asked for is not traded for what would be expected to answer better."""
    packed = Formats("exact", "int8", "int8")
    offered = list(choices(name, {}, True, packed, SHAPE))
    assert {formats for _, formats in offered} == {packed}
    assert offered[0].formats == next(iter(choices(name, {}, False, packed, SHAPE))).formats


def test_without_a_budget_parameters_take_their_defaults() -> None:
    assert list(choices(None, {}, False, None, SHAPE)) == [Choice(Full(), Formats())]
    assert list(candidates("avl", {"secondary": 60}, False)) == [Choice(Avl(secondary=60), Formats())]
    packed = Formats("int8", "int8", "int4")
    assert list(choices(None, {}, False, packed, SHAPE)) == [Choice(Full(), packed)]
    assert list(candidates("avl", {}, False, packed)) == [Choice(Avl(), packed)]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("avll", {}, "choose one of full"),
        ("full", {"core": 3}, "a parameter of avl, attentionpack, coarse"),
        (None, {"core": 3}, "name the method"),
        ("avl", {"cores": 3}, "it takes by_values, core, drift, heavy"),
    ],
)
def test_unknown_methods_and_parameters(name: str | None, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        list(choices(name, parameters, False, None, SHAPE))


@pytest.mark.parametrize("method", METHODS.values())
def test_every_method_offers_candidates_that_shrink(method: type[Full] | type[Avl]) -> None:
    peaks = [each.peak_rows(PromptShape(35, 576, 36), 50, 4) for each in method.ladder({})]
    assert peaks == sorted(peaks, reverse=True)


def test_rows_that_cannot_be_packed_are_evicted() -> None:
    """One head of 16 in two bytes: an int8 row would be no smaller, and nobody asked for one."""
    small = KvShape(layers=4, kv_heads=1, head_dim=16, itemsize=2)
    prompt = PromptShape(30, 576, 20)
    full = Full().peak_rows(prompt, 9, small.layers)
    found = fit(choices(None, {}, True, None, small), small, prompt, 9, full * small.row_bytes // 3)
    assert found.formats.all_exact
    assert found.method.peak_rows(prompt, 9, small.layers) <= full // 3
