"""Plans within limits of memory and time: kept, or refused with the cheapest ways to a plan that keeps them."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.config import Formats
from avl_edge.errors import BadInput
from avl_edge.kv.layout import page_bytes
from avl_edge.kv.methods import Avl, Full
from avl_edge.machine import profile
from avl_edge.model.known import KNOWN, known_shape
from avl_edge.model.sizes import ModelShape, Precision
from avl_edge.planning.estimate import Alternative, Estimate, PlanRequest, Refused, estimates, first_fit, plan, report

ORIN = profile.named("agx-orin-64", "MAXN")
SHIPPED = list(profile.shipped().values())
_requests = st.builds(
    PlanRequest,
    images=st.integers(0, 4),
    max_new_tokens=st.integers(1, 400),
    streams=st.integers(1, 8),
    method=st.sampled_from([None, "full", "avl", "fastv"]),
    weights=st.sampled_from([None, Precision("int4", "fp16")]),
    max_memory=st.sampled_from([None, 4 * 10**9, 12 * 10**9, 16 * 10**9, 30 * 10**9]),
    target_ms_per_token=st.sampled_from([None, 25.0, 100.0, 200.0]),
)
_models = st.sampled_from([known_shape(name) for name in ("llava-1.5-7b", "llava-1.5-13b", "qwen2-vl-2b")])


@settings(deadline=None, max_examples=15)
@given(model=_models, request=_requests, of=st.sampled_from(SHIPPED))
def test_a_plan_keeps_both_constraints_and_a_refusal_proposes_what_does(
    model: ModelShape, request: PlanRequest, of: profile.DeviceProfile
) -> None:
    found = _outcome(model, of, request)
    if isinstance(found, BadInput):
        assert "context" in str(found)
    elif isinstance(found, Refused):
        prices = [alternative.price for alternative in found.alternatives]
        assert len(prices) <= 3
        assert [0.0, *prices] == sorted([0.0, *prices])
        for alternative in found.alternatives:
            assert _applied(alternative, model.name, of, request) is not None, alternative
    else:
        _keeps(found, request)
        better = itertools.takewhile(lambda each: each != found, estimates(model, of, request))
        assert not any(each.fits for each in better)


def _outcome(model: ModelShape, of: profile.DeviceProfile, request: PlanRequest) -> Estimate | Refused | BadInput:
    try:
        return plan(model, of, request, SHIPPED)
    except (Refused, BadInput) as refusal:
        return refusal


def _keeps(found: Estimate, request: PlanRequest) -> None:
    assert found.memory.peak_bytes <= min(request.max_memory or 2**60, found.profile.memory.budget_bytes)
    assert found.time.ms_per_token <= (request.target_ms_per_token or 1e9)
    assert found.kv.bytes_stored <= found.kv.bytes_peak
    # What no method exceeds are full attention's rows; those of each format may leave one page part empty.
    part_empty = len(set(found.formats.by_tier().values())) * page_bytes(found.model.kv_shape())
    assert found.kv.bytes_peak < found.kv.bytes_full + part_empty
    assert found.memory.kv_bytes == found.request.streams * found.kv.bytes_peak


def _applied(alternative: Alternative, model: str, of: profile.DeviceProfile, request: PlanRequest) -> Estimate | None:
    """The plan once the options of ``alternative`` are given, read from its text as a person would."""
    words = alternative.option.replace("--method distinct without its parameters", "--method distinct").split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    device = options.pop("--device", of.device.name)
    power = options.pop("--power", of.power_mode.name if of.power_mode else None)
    shape = known_shape(options.pop("--model", model))
    changes: dict[str, object] = {}
    for option, value in options.items():
        if option == "--weights":
            changes["weights"] = Precision(value, (request.weights or shape.stored).head)
        elif option == "--max-memory":
            changes["max_memory"] = int(value.removesuffix("B"))
        elif option == "--target-ms-per-token":
            changes["target_ms_per_token"] = float(value)
        elif option == "--method":
            changes.update(method=value, parameters={})
        else:
            changes[option[2:].replace("-", "_")] = int(value)
    return first_fit(shape, profile.named(device, power), replace(request, **changes))  # type: ignore[arg-type]


def test_the_smallest_memory_fits_and_a_byte_less_does_not() -> None:
    model, request = known_shape("llava-1.5-7b"), PlanRequest(streams=4, images=3, max_memory=15 * 10**9)
    with pytest.raises(Refused, match="--max-memory") as refusal:
        plan(model, ORIN, request)
    smallest = next(
        int(alternative.option.split()[1][:-1])
        for alternative in refusal.value.alternatives
        if "max-memory" in alternative.option
    )
    assert plan(model, ORIN, replace(request, max_memory=smallest)).memory.peak_bytes == smallest
    with pytest.raises(Refused):
        plan(model, ORIN, replace(request, max_memory=smallest - 1))


def test_a_refusal_names_three_alternatives() -> None:
    request = PlanRequest(images=3, streams=4, max_memory=20 * 10**9, target_ms_per_token=100)
    with pytest.raises(Refused, match=r"\(1\).*\(2\).*\(3\)"):
        plan(known_shape("llava-1.5-13b"), profile.named("agx-orin-32", "15W"), request, SHIPPED)


def test_tighter_memory_costs_quality_not_more() -> None:
    """A method that was named changes as little as will do: the next higher S would exceed the limit."""
    model = known_shape("llava-1.5-7b")
    base = plan(model, ORIN, PlanRequest()).memory
    spared = base.peak_bytes - base.kv_bytes
    for formats, limit in (
        (None, spared + base.kv_bytes * 2 // 3),
        (Formats("int8", "int8", "int4"), spared + base.kv_bytes // 5),
    ):
        found = plan(model, ORIN, PlanRequest(method="avl", formats=formats, max_memory=limit))
        assert isinstance(found.method, Avl)
        assert found.formats == (formats or Formats())
        more = next(each for each in Avl.ladder({}) if each.secondary == found.method.secondary + 1)
        assert spared + Estimate(model, ORIN, found.request, more, found.formats).kv.bytes_peak > limit


def test_without_a_method_full_attention_gives_way_only_where_it_must() -> None:
    model = known_shape("llava-1.5-7b")
    base = plan(model, ORIN, PlanRequest())
    assert (base.method, base.formats) == (Full(), Formats())
    found = plan(model, ORIN, PlanRequest(max_memory=base.memory.peak_bytes))
    assert (found.method, found.formats) == (Full(), Formats())
    found = plan(model, ORIN, PlanRequest(max_memory=base.memory.peak_bytes - 1))
    assert (found.method, found.formats) != (Full(), Formats())
    assert found.memory.peak_bytes < base.memory.peak_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": -1}, "images"),
        ({"streams": 0}, "streams"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"system_tokens": 99}, "system_tokens"),
        ({"image_size": (0, 5)}, "image_size"),
        ({"max_memory": 0}, "max_memory"),
        ({"target_ms_per_token": 0.0}, "target_ms_per_token"),
        ({"target_ms_per_token": float("nan")}, "target_ms_per_token"),
        ({"target_ms_per_token": float("inf")}, "above 0 and finite"),
        ({"image_tokens": -1}, "image_tokens must be from 0 to"),
        ({"prompt_tokens": 0, "system_tokens": 0}, "prompt_tokens must be from 1 to"),
        ({"prompt_tokens": 10**14}, "prompt_tokens must be from 1 to"),
        ({"max_new_tokens": 10**14}, "max_new_tokens must be from 1 to"),
    ],
)
def test_absurd_requests_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        replace(PlanRequest(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("of", SHIPPED, ids=lambda each: each.name)
@pytest.mark.parametrize("model", KNOWN.values(), ids=lambda each: each.name)
def test_every_model_is_planned_on_every_device(model: ModelShape, of: profile.DeviceProfile) -> None:
    found = _outcome(model, of, PlanRequest())
    if isinstance(found, Refused):
        assert found.alternatives
        return
    assert isinstance(found, Estimate)
    text = report(found)
    assert "[derived, not measured]" in text
    assert not re.search(r"(?<!not )measure", text)
    assert found.time.basis == found.memory.basis == "derived"
