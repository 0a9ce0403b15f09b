"""Sizes, and the arithmetic from a budget to a method."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.budget import fit
from avl_edge.config import KvShape, PromptShape, format_size, parse_size
from avl_edge.errors import BadInput, DoesNotFit
from avl_edge.policies import METHODS, Avl, Full, candidates

SHAPE = KvShape(layers=4, kv_heads=2, head_dim=16, itemsize=2)


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


@settings(deadline=None)
@given(prompt=_prompts, steps=st.integers(0, 300), share=st.floats(0.02, 1.2), fixed=_fixed)
def test_a_fit_keeps_the_budget_and_a_refusal_names_the_smallest(
    prompt: PromptShape, steps: int, share: float, fixed: dict[str, float]
) -> None:
    budget = int(share * Full().peak_rows(prompt, steps, SHAPE.layers) * SHAPE.row_bytes) + 1
    try:
        plan = fit(candidates("avl", fixed, True), SHAPE, prompt, steps, budget)
    except DoesNotFit as refusal:
        smallest = int(str(refusal).split("would do is ")[1].split("(")[1].split(" bytes")[0])
        assert smallest > budget
        assert fit(candidates("avl", fixed, True), SHAPE, prompt, steps, smallest).peak_bytes == smallest
        with pytest.raises(DoesNotFit):
            fit(candidates("avl", fixed, True), SHAPE, prompt, steps, smallest - 1)
    else:
        assert plan.peak_bytes <= budget
        assert {name: getattr(plan.method, name) for name in fixed} == fixed
        assert isinstance(plan.method, Avl)


@settings(deadline=None)
@given(prompt=_prompts, steps=st.integers(0, 300), low=st.floats(0.3, 1.0), more=st.floats(0, 0.5))
def test_a_larger_budget_never_stores_less(prompt: PromptShape, steps: int, low: float, more: float) -> None:
    full = Full().peak_rows(prompt, steps, SHAPE.layers) * SHAPE.row_bytes
    stored = []
    for budget in (int(full * low), int(full * (low + more))):
        try:
            stored.append(fit(candidates("avl", {}, True), SHAPE, prompt, steps, budget).peak_bytes)
        except DoesNotFit:
            stored.append(0)
    assert stored[0] <= stored[1]


def test_full_attention_is_taken_where_it_fits() -> None:
    prompt = PromptShape(30, 576, 20)
    full = Full().peak_rows(prompt, 9, SHAPE.layers) * SHAPE.row_bytes
    assert fit(candidates(None, {}, True), SHAPE, prompt, 9, full).method == Full()
    assert isinstance(fit(candidates(None, {}, True), SHAPE, prompt, 9, full - 1).method, Avl)


def test_without_a_budget_parameters_take_their_defaults() -> None:
    assert list(candidates(None, {}, False)) == [Full()]
    assert list(candidates("avl", {"secondary": 60}, False)) == [Avl(secondary=60)]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("avll", {}, "choose one of full"),
        ("full", {"core": 3}, "a parameter of avl"),
        (None, {"core": 3}, "name the method"),
        ("avl", {"cores": 3}, "it takes core, heavy"),
    ],
)
def test_unknown_methods_and_parameters(name: str | None, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        list(candidates(name, parameters, False))


@pytest.mark.parametrize("method", METHODS.values())
def test_every_method_offers_candidates_that_shrink(method: type[Full] | type[Avl]) -> None:
    peaks = [each.peak_rows(PromptShape(35, 576, 36), 50, 4) for each in method.ladder({})]
    assert peaks == sorted(peaks, reverse=True)
