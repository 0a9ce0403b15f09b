"""Profiles of devices: what is shipped, and which profile is for which machine."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from avl_edge.errors import BadInput
from avl_edge.machine import device, profile
from avl_edge.machine.profile import ANY, BadProfile, DeviceProfile, Figure, Sample
from tests.equipment.machines import TREES
from tests.equipment.profiles import ORIN, SHIPPED, measured_profile
from tools.derive_profiles import profiles as derived_profiles

# What is shipped


def test_every_power_mode_of_both_modules_and_two_processors_are_shipped() -> None:
    modes = {(each.device.name, each.power_mode.name if each.power_mode else None) for each in SHIPPED.values()}
    assert modes == {
        *(("agx-orin-64", mode) for mode in ("MAXN", "MODE_15W", "MODE_30W", "MODE_50W")),
        *(("agx-orin-32", mode) for mode in ("MAXN", "MODE_15W", "MODE_30W", "MODE_40W")),
        ("cpu-x86", None),
        ("cpu-arm64", None),
    }


def _figures(part: Any) -> list[Figure]:
    if isinstance(part, Figure):
        return [part]
    if isinstance(part, dict):
        return [figure for each in part.values() for figure in _figures(each)]
    if hasattr(part, "__dataclass_fields__"):
        return [figure for each in fields(part) for figure in _figures(getattr(part, each.name))]
    return []


@pytest.mark.parametrize("each", SHIPPED.values(), ids=SHIPPED)
def test_nobody_measured_what_is_shipped_and_it_never_says_so(each: DeviceProfile) -> None:
    figures = _figures(each)
    assert len(figures) >= 20
    assert {figure.basis for figure in figures} == {"derived"}
    assert all(figure.origin for figure in figures)
    text = profile.report(each)
    assert len(re.findall(r"  derived  ", text)) == len(figures)
    assert "measured" not in text
    assert "not measured" in profile.svg(each)


@pytest.mark.parametrize("each", derived_profiles(), ids=lambda each: each.name)
def test_shipped_files_are_what_the_tool_derives(each: DeviceProfile) -> None:
    assert SHIPPED[each.name] == each


def test_derived_numbers_by_hand() -> None:
    """204.8 GB/s at 3199 MHz, 136.5 at 2133 MHz; of it 156/204.8; 62,780 MB; 42.6 TFLOPS at MAXN, half of it.

    At 15 W 3 of 8 TPCs are left, at 408 of 1300.5 MHz: 5.01 TFLOPS.
    """
    slow, fast = SHIPPED["agx-orin-64-15w"], SHIPPED["agx-orin-64-maxn"]
    papers = [each.memory.paper_bandwidth_bytes_per_s for each in (fast, slow)]
    assert [paper.value / 1e9 for paper in papers if paper] == pytest.approx([204.8, 136.5], rel=1e-3)
    assert fast.memory.bandwidth_bytes_per_s.value / 1e9 == pytest.approx(156, rel=1e-3)
    assert fast.memory.total_bytes.value / 2**20 == pytest.approx(62_780, rel=1e-4)
    assert fast.models[ANY].costs.prefill_ms_per_tflop.value == pytest.approx(1000 / 21.3, rel=2e-3)
    assert slow.models[ANY].costs.prefill_ms_per_tflop.value == pytest.approx(2 * 1000 / 5.01, rel=2e-3)
    assert slow.models[ANY].costs.decode_ms_per_gb_of_rows.value == pytest.approx(1000 / 104, rel=2e-3)


# Which profile is for which machine


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ("agx-orin-64-jp62", "agx-orin-64"),
        ("agx-orin-64-jp72", "agx-orin-64"),
        ("agx-orin-32-jp62", "agx-orin-32"),
        ("agx-orin-32-jp72", "agx-orin-32"),
        ("pc-no-gpu", "cpu-x86"),
        ("container-limit", "cpu-x86"),
    ],
)
def test_a_recorded_machine_finds_its_profile(tree: str, name: str) -> None:
    facts = device.probe(TREES / tree)
    found = profile.for_machine(facts)
    assert found.device.name == name
    if found.power_mode:
        assert found.power_mode.name == facts.power.mode_name
    local = profile.with_memory(found, facts)
    assert local.memory.available_bytes == Figure(
        facts.memory.usable_bytes or 0, "measured", local.memory.available_bytes.origin
    )


def test_a_machine_without_a_profile_is_told_what_to_do() -> None:
    with pytest.raises(BadProfile, match=r"p3767.*avl-edge profile"):
        profile.for_machine(device.probe(TREES / "orin-nano-jp62"))


def test_another_machine_or_power_mode_is_refused_by_name() -> None:
    facts = device.probe(TREES / "agx-orin-64-jp62")
    mode = facts.power.mode_name
    profile.require_match(profile.named("agx-orin-64", mode), facts, "--replace")
    other = next(each for each in SHIPPED.values() if each.power_mode and each.power_mode.name not in (mode, "MAXN"))
    with pytest.raises(BadProfile, match=r"power mode|agx-orin-32.*--replace"):
        profile.require_match(other, facts, "--replace")
    with pytest.raises(BadProfile, match=r"agx-orin-32 .*--replace"):
        profile.require_match(SHIPPED["agx-orin-32-maxn"], facts, "--replace")
    with pytest.raises(BadProfile, match=r"cpu-x86 \(linux\).*jetson"):
        profile.require_match(SHIPPED["cpu-x86"], facts, "--replace")


def test_a_jetson_that_does_not_tell_its_module_finds_its_own_profile() -> None:
    facts = device.probe(TREES / "agx-orin-64-jp62")
    facts = replace(facts, identity=replace(facts.identity, module_id=None))
    mine = replace(ORIN, device=profile.device_of(facts), power_mode=profile.mode_of(facts))
    profile.require_match(mine, facts, "--replace")
    with pytest.raises(BadProfile, match="agx-orin-32"):
        profile.require_match(SHIPPED["agx-orin-32-maxn"], facts, "--replace")


def test_own_profiles_come_before_shipped_ones(tmp_path: Path) -> None:
    facts = device.probe(TREES / "pc-no-gpu")
    mine = replace(SHIPPED["cpu-x86"], name="mine", device=profile.device_of(facts))
    profile.save(mine, tmp_path / "mine.yaml")
    assert profile.for_machine(facts, [each for _, each in profile.own(tmp_path)]) == mine
    stranger = replace(mine, device=replace(mine.device, cpu="another processor"))
    assert profile.for_machine(facts, [stranger]).name == "cpu-x86"


def test_names_and_power_modes() -> None:
    assert profile.named("AGX-Orin-64", "30w") == profile.named("agx-orin-64", "MODE_30W") == ORIN
    assert profile.named("agx-orin-64", None) == ORIN  # the default mode of the device
    assert profile.named("agx-orin-64-15w", None).name == "agx-orin-64-15w"
    with pytest.raises(BadProfile, match=r"no power mode '40W'.*maxn, 15w|15w.*50w"):
        profile.named("agx-orin-64", "40W")
    with pytest.raises(BadProfile, match="no power modes"):
        profile.named("cpu-x86", "30W")
    with pytest.raises(BadInput, match="agx-orin-32"):
        profile.named("toaster", None)


def test_profiling_again_adds_to_what_is_known() -> None:
    old = measured_profile()
    again = Sample("decode", "full, 1 image", 9.0, 24, {"decode_us_per_layer": 8.0})
    record = replace(old.models["demo"], samples=(again,))
    other = replace(old.models["demo"], samples=())
    new = replace(old, name="fresh", date="2027-01-01", models={ANY: old.models[ANY], "demo": record, "llava": other})
    merged = profile.merged(old, new)
    assert (merged.name, merged.date) == ("mine", "2027-01-01")
    assert set(merged.models) == {ANY, "demo", "llava"}
    assert [sample.ms for sample in merged.models["demo"].samples] == [4.5, 9.0]
