"""Recorded file trees of machines: what they say, read by hand from the files, is what `probe` finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avl_edge.errors import BadInput
from avl_edge.machine.device import DeviceFacts, diagnose, probe, read_memory, read_power, read_thermal, report, to_dict
from tests.equipment.machines import NAMES, TREES, copy_of_orin

JETSONS = [name for name in NAMES if "orin" in name]

# By dotted name. A clock of 3199 MHz on a bus of 256 bit: 3199e6 x 2 x 32 bytes/s; 2133 MHz the same way.
EXPECTED: dict[str, dict[str, object]] = {
    "agx-orin-64-jp62": {
        "identity.kind": "jetson",
        "identity.model": "NVIDIA Jetson AGX Orin Developer Kit",
        "identity.module_id": "p3701-0005",
        "identity.soc": "tegra234",
        "identity.architecture": "aarch64",
        "identity.system": "Ubuntu 22.04.5 LTS",
        "identity.kernel": "5.15.148-tegra",
        "identity.container": False,
        "software.l4t": "36.4.3",
        "software.jetpack": "6.2",
        "software.jetpack_package": "6.2",
        "software.jetpack_from_l4t": "6.2",
        "software.cuda": "12.6",
        "software.tensorrt": "10.3.0.30",
        "software.python": "3.10",
        "software.compiler": "/usr/bin/g++",
        "software.jetson_stats": True,
        "memory.total_bytes": 62780 * 2**20,
        "memory.available_bytes": 49968128 * 1024,
        "memory.usable_bytes": 49968128 * 1024,
        "memory.free_blocks": {"count": 424, "block_bytes": 4 * 2**20},
        "memory.emc_cap_hz": 3_199_000_000,
        "memory.emc_hz": 2_133_000_000,
        "memory.bandwidth_bytes_per_s": 204_736_000_000,
        "memory.cgroup.limit_bytes": None,
        "cpu.name": "Cortex-A78AE",
        "cpu.logical": 12,
        "cpu.max_hz": 2_201_600_000,
        "gpus.0.sm": "sm_87",
        "gpus.0.integrated": True,
        "gpus.0.memory_bytes": None,
        "gpus.0.cur_hz": 407_000_000,
        "gpus.0.max_hz": 1_300_500_000,
        "gpus.0.load_percent": 14.0,
        "power.mode_id": 0,
        "power.mode_name": "MAXN",
        "power.rails_sum_mw": 3150 + 14312 + 4968 + 1091,
        "telemetry": "tegrastats",
        "warnings": [],
    },
    "agx-orin-64-jp72": {
        "identity.module_id": "p3701-0005",
        "identity.system": "Ubuntu 24.04.4 LTS",
        "software.l4t": "39.2.0",
        "software.jetpack": "7.2",
        "software.jetpack_package": "7.2",
        "software.jetpack_from_l4t": "7.2",
        "software.cuda": "13.2",
        "software.tensorrt": "10.16.1.11",
        "software.python": "3.12",
        "software.jetson_stats": False,
        "memory.total_bytes": 62780 * 2**20,
        "memory.free_blocks": {"count": 200, "block_bytes": 4 * 2**20},
        "memory.emc_cap_hz": None,
        "memory.bandwidth_bytes_per_s": 204_736_000_000,
        "cpu.logical": 8,
        "cpu.max_hz": 1_728_000_000,
        "gpus.0.max_hz": 612_000_000,
        "gpus.0.load_percent": 0.0,
        "power.mode_id": 2,
        "power.mode_name": "MODE_30W",
        "power.rails_sum_mw": 20 * 150 + 20 * 50 + 5 * 800,
        "telemetry": "sysfs",
        "warnings": [],
    },
    "agx-orin-32-jp62": {
        "identity.model": "NVIDIA Jetson AGX Orin",
        "identity.module_id": "p3701-0004",
        "software.l4t": "36.4.3",
        "software.jetpack": "6.2",
        "memory.total_bytes": 30587 * 2**20,
        "memory.free_blocks": {"count": 2, "block_bytes": 512 * 2**10},
        "memory.emc_cap_hz": 2_133_000_000,
        "memory.bandwidth_bytes_per_s": 136_512_000_000,
        "cpu.logical": 4,
        "cpu.max_hz": 1_113_600_000,
        "gpus.0.cur_hz": 408_000_000,
        "gpus.0.load_percent": 100.0,
        "power.mode_id": 1,
        "power.mode_name": "MODE_15W",
        "thermal.throttling": ["gpu-throttle-alert"],
    },
    "agx-orin-32-jp72": {
        "identity.module_id": "p3701-0004",
        "software.l4t": "39.2.0",
        "software.jetpack": "7.2",
        "software.cuda": "13.2",
        "memory.total_bytes": 30587 * 2**20,
        "memory.free_blocks": {"count": 1000, "block_bytes": 4 * 2**20},
        "memory.emc_cap_hz": 3_199_000_000,
        "memory.bandwidth_bytes_per_s": 204_736_000_000,
        "power.mode_id": 2,
        "power.mode_name": "MODE_30W",
        "gpus.0.load_percent": 5.2,
    },
    "orin-nano-jp62": {
        "identity.module_id": "p3767-0005",
        "memory.total_bytes": 7620 * 2**20,
        "memory.free_blocks": {"count": 8, "block_bytes": 4 * 2**20},
        "memory.bandwidth_bytes_per_s": 102_368_000_000,
        "memory.emc_hz": 204_000_000,
        "power.mode_id": 1,
        "power.mode_name": "25W",
        "power.rails_sum_mw": 5251,
        "gpus.0.sm": "sm_87",
    },
    "pc-no-gpu": {
        "identity.kind": "linux",
        "identity.model": "PowerEdge R640",
        "identity.architecture": "x86_64",
        "identity.soc": None,
        "software.l4t": None,
        "software.jetpack": None,
        "memory.total_bytes": 128 * 2**30,
        "memory.cgroup.limit_bytes": None,
        "memory.bandwidth_bytes_per_s": None,
        "cpu.name": "Intel(R) Xeon(R) Silver 4208 CPU @ 2.10GHz",
        "cpu.logical": 16,
        "cpu.cores": 8,
        "cpu.max_hz": 3_200_000_000,
        "cpu.numa": [
            {"id": 0, "cpus": [0, 1, 2, 3, 8, 9, 10, 11], "memory_bytes": 64 * 2**30},
            {"id": 1, "cpus": [4, 5, 6, 7, 12, 13, 14, 15], "memory_bytes": 64 * 2**30},
        ],
        "gpus": [],
        "thermal.temperatures.0.celsius": 41.0,
    },
    "pc-gpu": {
        "identity.kind": "linux",
        "software.nvidia_driver": "550.54.14",
        "software.cuda": "12.4",
        "gpus.0.name": "NVIDIA GeForce RTX 4090",
        "gpus.0.sm": "sm_89",
        "gpus.0.integrated": False,
        "gpus.0.memory_bytes": 24564 * 2**20,
        "memory.cgroup": None,
    },
    "container-limit": {
        "identity.container": True,
        "memory.total_bytes": 65843264 * 1024,
        "memory.available_bytes": 55000000 * 1024,
        "memory.cgroup.version": 2,
        "memory.cgroup.limit_bytes": 8 * 2**30,
        "memory.cgroup.used_bytes": 2 * 2**30,
        "memory.cgroup.reclaimable_bytes": 2**29,
        "memory.cgroup.room_bytes": 6 * 2**30 + 2**29,
        "memory.usable_bytes": 6 * 2**30 + 2**29,
    },
}


def _at(content: object, name: str) -> object:
    for part in name.split("."):
        content = content[int(part)] if isinstance(content, list) else content[part]  # type: ignore[index]
    return content


def _json(facts: DeviceFacts) -> dict[str, object]:
    """As a program reads it: through JSON, which also forbids infinities and objects of ours."""
    loaded = json.loads(json.dumps(to_dict(facts, diagnose(facts)), allow_nan=False))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_of_orin(tmp_path)


def test_every_tree_has_its_expectations() -> None:
    assert set(EXPECTED) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_tree_gives_the_expected_facts(name: str) -> None:
    facts = _json(probe(TREES / name))["facts"]
    assert {field: _at(facts, field) for field in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("name", JETSONS)
def test_derived_facts_say_so(name: str) -> None:
    facts = probe(TREES / name)
    assert "not measured" in facts.derived["memory.bandwidth_bytes_per_s"]
    assert "derived" in next(line for line in report(facts, ()).splitlines() if line.startswith("bandwidth"))
    assert {"gpus.sm", "software.jetpack_from_l4t"} <= set(facts.derived)


def test_modes_are_those_of_the_devices_file() -> None:
    modes = {mode.name: mode for mode in probe(TREES / "agx-orin-64-jp62").power.modes}
    assert {name: mode.id for name, mode in modes.items()} == {"MAXN": 0, "MODE_15W": 1, "MODE_30W": 2, "MODE_50W": 3}
    assert (modes["MODE_15W"].cpus, modes["MODE_15W"].cpu_max_hz) == (4, 1_113_600_000)
    assert (modes["MODE_15W"].gpu_max_hz, modes["MODE_15W"].emc_max_hz) == (408_000_000, 2_133_000_000)
    assert (modes["MODE_50W"].cpus, modes["MODE_50W"].gpu_max_hz) == (12, 816_000_000)
    assert (modes["MAXN"].cpus, modes["MAXN"].gpu_max_hz, modes["MAXN"].emc_max_hz) == (12, None, None)


def test_temperatures_take_the_newest_reading_and_the_kernels_limit() -> None:
    zones = {zone.name: zone for zone in probe(TREES / "agx-orin-64-jp62").thermal.temperatures}
    assert (zones["tj-thermal"].celsius, zones["tj-thermal"].limit_celsius) == (77.281, 100.0)
    assert (zones["cpu-thermal"].celsius, zones["cpu-thermal"].limit_celsius) == (73.0, 99.0)
    assert zones["CV0"].celsius == 73.625  # its kernel zone has no power, and reads -256


def test_without_status_file_the_default_mode_is_marked_derived(tree: Path) -> None:
    (tree / "var/lib/nvpmodel/status").unlink()
    facts = probe(tree)
    assert (facts.power.mode_id, facts.power.mode_name) == (2, "MODE_30W")
    assert "default" in facts.derived["power.mode_id"]


def test_jetson_stats_is_preferred(tree: Path) -> None:
    sample = {
        "temperature": {"CPU": {"temp": 51.5, "online": True}, "CV0": {"temp": -256, "online": False}},
        "power": {"rail": {"VDD_CPU_CV": {"volt": 19976, "curr": 20, "power": 400, "online": True}}, "tot": {}},
        "memory": {"EMC": {"cur": 3199000, "val": 1}},
    }
    (tree / "commands/jtop").write_text(json.dumps(sample))
    facts = probe(tree)
    assert facts.telemetry == "jetson-stats"
    assert facts.memory.emc_hz == 3_199_000_000
    assert [(rail.name, rail.power_mw) for rail in facts.power.rails] == [("VDD_CPU_CV", 400)]
    assert {zone.name: zone.celsius for zone in facts.thermal.temperatures}["cpu-thermal"] == 51.5


def test_least_room_of_nested_groups_counts(tmp_path: Path) -> None:
    base = tmp_path / "sys/fs/cgroup/a/b"
    base.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    for folder, limit, used in ((base, 8 << 30, 1 << 30), (base.parent, 10 << 30, 9 << 30)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    cgroup = probe(tmp_path).memory.cgroup
    assert cgroup is not None
    assert (cgroup.limit_bytes, cgroup.room_bytes) == (10 << 30, 1 << 30)


@pytest.mark.parametrize(("text", "limit"), [("268435456\n", 2**28), ("9223372036854771712\n", None)])
def test_version_1_groups(tmp_path: Path, text: str, limit: int | None) -> None:
    """The path names a group of the host, which a container does not see: its own limit is at the top."""
    base = tmp_path / "sys/fs/cgroup/memory"
    base.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/docker/0123\n0::/docker/0123\n")
    (base / "memory.limit_in_bytes").write_text(text)
    (base / "memory.usage_in_bytes").write_text("1048576\n")
    cgroup = probe(tmp_path).memory.cgroup
    assert cgroup is not None
    assert (cgroup.version, cgroup.limit_bytes, cgroup.used_bytes) == (1, limit, 2**20)


def test_what_changes_can_be_read_alone() -> None:
    root = TREES / "agx-orin-32-jp62"
    facts, memory = probe(root), read_memory(root)
    assert (memory.total_bytes, memory.usable_bytes) == (facts.memory.total_bytes, facts.memory.usable_bytes)
    assert read_power(root).mode_id == facts.power.mode_id
    assert read_thermal(root).throttling == ("gpu-throttle-alert",)
    assert read_memory(TREES / "container-limit").usable_bytes == 6 * 2**30 + 2**29


def test_root_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(BadInput, match="not a folder"):
            probe(root)


def test_this_machine() -> None:
    facts = probe()
    assert facts.memory.total_bytes is not None
    assert facts.memory.usable_bytes is not None
    assert 0 < facts.memory.usable_bytes <= facts.memory.total_bytes
    assert facts.cpu.logical
    assert facts.software.python
    assert report(facts, diagnose(facts))
    assert _json(facts)
