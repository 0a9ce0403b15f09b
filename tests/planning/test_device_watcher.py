"""A device that changes between two requests: another power mode, a thermal alert, or a machine nobody knows."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from avl_edge import BadInput, DoesNotFit, Options, Runtime
from avl_edge.kv.layout import page_bytes
from avl_edge.machine import profile
from avl_edge.machine.profile import DeviceProfile, Figure
from avl_edge.model.known import known_shape, shape_of_checkpoint
from avl_edge.planning import estimate
from avl_edge.planning.device_watcher import DeviceWatcher, PlanObjectives
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.machines import copy_of_orin

LLAVA = known_shape("llava-1.5-7b")
IMAGE = random_image(3, (120, 80))
PROMPT = "Describe the picture in detail."


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the AGX Orin's tree, in MAXN."""
    return copy_of_orin(tmp_path)


def _set_mode(tree: Path, mode: int) -> None:
    (tree / "var/lib/nvpmodel/status").write_text(f"pmode:{mode:04d}\n")


def _alert(tree: Path, state: int) -> str:
    """Switch the first thermal alert; its name."""
    for kind in sorted(tree.glob("sys/class/thermal/cooling_device*/type")):
        if kind.read_text().strip().endswith("-alert"):
            kind.with_name("cur_state").write_text(f"{state}\n")
            return kind.read_text().strip()
    raise AssertionError("the tree has no alert")


def _watcher(tree: Path, streams: int = 1, **options: object) -> DeviceWatcher:
    return DeviceWatcher(LLAVA, PlanObjectives(streams), root=tree, every_ms=0, **options)  # type: ignore[arg-type]


def test_the_profile_is_that_of_the_present_mode(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    watcher = _watcher(tree)
    with caplog.at_level(logging.WARNING, "avl_edge"):
        first = watcher.state()
        assert (first.stats.profile, first.stats.power_mode) == ("agx-orin-64-maxn", "MAXN")
        assert first.stats.changed is None
        assert watcher.state().stats == first.stats
        _set_mode(tree, 2)
        second = watcher.state()
        assert (second.stats.profile, second.stats.power_mode) == ("agx-orin-64-30w", "MODE_30W")
        expected = "power mode MAXN -> MODE_30W, profile agx-orin-64-maxn -> agx-orin-64-30w"
        assert second.stats.changed == expected
        assert watcher.state().stats.changed is None
    assert [record.message for record in caplog.records] == [
        f"avl-edge: the device has changed: {expected}; requests are planned anew"
    ]


def test_an_alert_is_told_when_it_begins_and_when_it_ends(tree: Path) -> None:
    watcher = _watcher(tree)
    name = _alert(tree, 0)
    before = watcher.state().stats.throttling
    _alert(tree, 1)
    during = watcher.state().stats
    assert (during.throttling, during.changed) == ((*before, name), f"slowed down by {name}")
    _alert(tree, 0)
    assert watcher.state().stats.changed == f"no longer slowed down by {name}"


def test_a_mode_without_a_profile_leaves_requests_as_they_are(tree: Path) -> None:
    watcher = _watcher(tree)
    assert watcher.state().kv_budget
    module = tree / "proc/device-tree/compatible"
    module.write_bytes(module.read_bytes().replace(b"p3701-0005", b"p3767-0003"))
    state = watcher.state()
    assert state.kv_budget is None
    assert state.stats.profile is None
    assert state.stats.changed == "profile agx-orin-64-maxn -> none"


def test_it_looks_now_and_then(tree: Path) -> None:
    now = 10.0
    watcher = DeviceWatcher(LLAVA, PlanObjectives(), root=tree, every_ms=250, clock=lambda: now)
    watcher.state()
    _set_mode(tree, 2)
    now += 0.2
    assert watcher.state().stats.power_mode == "MAXN"
    now += 0.1
    changed = watcher.state().stats
    assert (changed.power_mode, changed.changed is None) == ("MODE_30W", False)
    assert watcher.state().stats.changed is None, "it was told already"


def test_own_profiles_come_first_and_a_given_one_holds_anywhere(tree: Path) -> None:
    own = replace(profile.shipped()["agx-orin-64-maxn"], name="mine")
    assert _watcher(tree, profiles=(own,)).state().stats.profile == "mine"
    _set_mode(tree, 2)
    assert _watcher(tree, profiles=(own,)).state().stats.profile == "agx-orin-64-30w"
    assert _watcher(tree, profiles=(own,), follows=False).state().stats.profile == "mine"
    with pytest.raises(BadInput, match="give a profile, or follow the device"):
        _watcher(tree, follows=False)


def test_the_budget_is_a_share_of_what_the_profile_leaves(tree: Path) -> None:
    of_device = profile.shipped()["agx-orin-64-maxn"]
    pool = estimate.kv_pool_bytes(LLAVA, of_device)
    parts = estimate.divide(LLAVA, of_device.memory, of_device.record(LLAVA.name).peaks)
    rest = parts.weights_bytes + parts.overhead_bytes + max(parts.vision_bytes, parts.activations_bytes)
    assert pool == parts.kv_pool_bytes == of_device.memory.budget_bytes - rest
    assert _watcher(tree, streams=3).state().kv_budget == pool // 3
    state = _watcher(tree, profiles=(_with_pool(of_device, 0),)).state()
    with pytest.raises(DoesNotFit, match=r"leaves no memory for the rows of llava-1\.5-7b"):
        _ = state.kv_budget


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"target_ms_per_token": 0}, {"target_ms_per_token": float("nan")}])
def test_objectives_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        PlanObjectives(**wrong)  # type: ignore[arg-type]


def _with_pool(of_device: DeviceProfile, nbytes: int, directory: Path | None = None) -> DeviceProfile:
    """The profile with so little memory that ``nbytes`` are left for the rows of a model."""
    model = shape_of_checkpoint(directory, directory.name) if directory else LLAVA
    parts = estimate.divide(model, of_device.memory, of_device.record(model.name).peaks)
    reserve = of_device.memory.reserve_bytes.value + parts.kv_pool_bytes - nbytes
    figure = Figure(reserve, "derived", "a test's")
    return replace(of_device, memory=replace(of_device.memory, reserve_bytes=figure))


def _modes(directory: Path, maxn: int, slower: int) -> list[DeviceProfile]:
    """Profiles of two power modes, with so many bytes for rows in each."""
    shipped = profile.shipped()
    return [
        replace(_with_pool(shipped[f"agx-orin-64-{mode}"], nbytes, directory), name=f"own-{mode}")
        for mode, nbytes in (("maxn", maxn), ("30w", slower))
    ]


def test_the_next_request_gets_the_budget_of_the_new_mode(checkpoint: Checkpoints, tree: Path) -> None:
    """The mode changes while one runs: it goes on as it was, the next is planned anew."""
    directory = checkpoint("mistral-gqa")
    full = Runtime.load(directory, threaded=False).prepare([IMAGE], PROMPT).plan
    profiles = _modes(directory, 4 * full.peak_bytes, 2 * full.peak_bytes)
    runtime = Runtime.load(directory, threaded=False)
    runtime.follow(profiles, root=tree, every_ms=0)
    first = runtime.generate([IMAGE], PROMPT)
    next(first)
    _set_mode(tree, 2)
    second = runtime.generate([IMAGE], PROMPT)
    results = [first.result(), second.result()]
    assert [result.kv.bytes_budget for result in results] == [full.peak_bytes, full.peak_bytes // 2]
    assert [result.device.profile if result.device else None for result in results] == ["own-maxn", "own-30w"]
    assert [result.device.changed if result.device else None for result in results] == [
        None,
        "power mode MAXN -> MODE_30W, profile own-maxn -> own-30w",
    ]
    assert results[0].formats == {"text": "exact", "core": "exact", "secondary": "exact"}
    assert results[1].formats != results[0].formats
    assert results[1].kv.bytes_peak <= full.peak_bytes // 2
    assert results[1].to_dict()["device"]["power_mode"] == "MODE_30W"
    _set_mode(tree, 0)
    assert runtime.generate([IMAGE], PROMPT).result().token_ids == results[0].token_ids


def test_what_a_request_says_itself_stays(checkpoint: Checkpoints, tree: Path) -> None:
    directory = checkpoint("mistral-gqa")
    plain = Runtime.load(directory, threaded=False)
    full = plain.prepare([IMAGE], PROMPT).plan
    runtime = Runtime.load(
        directory, profile=_modes(directory, 10**9, 10**9), follow_device=True, device_root=tree, threaded=False
    )
    budget = runtime.prepare([IMAGE], PROMPT, Options(kv_budget=full.peak_bytes // 2)).plan
    assert budget == plain.prepare([IMAGE], PROMPT, Options(kv_budget=full.peak_bytes // 2)).plan
    published = runtime.prepare([IMAGE], PROMPT, Options(method="avl")).plan
    assert published.method == plain.prepare([IMAGE], PROMPT, Options(method="avl")).plan.method
    assert published.budget is not None
    assert published.budget <= runtime.debug.pool.pages * page_bytes(runtime.kv_shape), "more than the pool has"


def test_a_target_in_time_follows_the_mode(checkpoint: Checkpoints, tree: Path) -> None:
    """Reading a row takes a thousand times longer in the slower mode: less is read there."""
    directory = checkpoint("mistral-gqa")
    modes = []
    for own, factor in zip(_modes(directory, 10**9, 10**9), (1, 1000), strict=True):
        record = own.models["any"]
        per_row = record.costs.decode_ms_per_gb_of_rows
        costs = replace(record.costs, decode_ms_per_gb_of_rows=replace(per_row, value=per_row.value * factor))
        modes.append(replace(own, models={"any": replace(record, costs=costs)}))
    plain = Runtime.load(directory, threaded=False).prepare([IMAGE], PROMPT)
    slow = _ms(directory, modes[1], plain)
    runtime = Runtime.load(directory, threaded=False)
    runtime.follow(modes, target_ms_per_token=0.7 * slow, root=tree, every_ms=0)
    assert runtime.prepare([IMAGE], PROMPT).plan.method == plain.plan.method
    _set_mode(tree, 2)
    slower = runtime.prepare([IMAGE], PROMPT)
    assert (slower.plan.method, slower.plan.formats) != (plain.plan.method, plain.plan.formats)
    assert _ms(directory, modes[1], slower) <= 0.7 * slow
    impatient = Runtime.load(
        directory, profile=modes, follow_device=True, target_ms_per_token=slow / 100, device_root=tree, threaded=False
    )
    with pytest.raises(DoesNotFit, match=r"ms per token at least by the profile own-30w, but the target is"):
        impatient.prepare([IMAGE], PROMPT)


def _ms(directory: Path, of_device: DeviceProfile, request: object) -> float:
    """The predicted time of a step of four such requests."""
    model = shape_of_checkpoint(directory, directory.name)
    prompt, plan = request.prompt, request.plan  # type: ignore[attr-defined]
    images = sum(span.length for span in prompt.spans)
    text = len(prompt) - images
    asked = estimate.PlanRequest(
        image_tokens=images,
        prompt_tokens=text,
        system_tokens=prompt.spans[0].start,
        max_new_tokens=request.max_new_tokens,  # type: ignore[attr-defined]
        streams=4,
    )
    return estimate.Estimate(model, of_device, asked, plan.method, plan.formats).ms_per_token


def test_without_a_profile_nothing_is_followed(checkpoint: Checkpoints) -> None:
    result = (
        Runtime.load(checkpoint("mistral-gqa"), threaded=False)
        .generate([IMAGE], PROMPT, Options(max_new_tokens=3))
        .result()
    )
    assert result.device is None
    assert result.kv.bytes_budget is None


def test_one_profile_holds_as_it_is_given(checkpoint: Checkpoints) -> None:
    directory = checkpoint("mistral-gqa")
    own = _modes(directory, 4 * 10**6, 10**6)[0]
    result = (
        Runtime.load(directory, profile=own, threaded=False)
        .generate([IMAGE], PROMPT, Options(max_new_tokens=3))
        .result()
    )
    assert result.kv.bytes_budget == 10**6
    assert result.device is not None
    assert (result.device.profile, result.device.changed) == ("own-maxn", None)
