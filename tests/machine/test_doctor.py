"""What the doctor says of a machine: what is wrong with it, what is unknown, and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from avl_edge.machine.device import Check, DeviceFacts, diagnose, exit_code, probe, report
from tests.equipment.machines import GB, NAMES, TREES, copy_of_orin, write


def _check(facts: DeviceFacts, name: str) -> Check:
    return next(check for check in diagnose(facts) if check.name == name)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_of_orin(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_report_is_text_for_people(name: str) -> None:
    facts = probe(TREES / name)
    checks = diagnose(facts)
    text = report(facts, checks)
    assert exit_code(checks) == 0
    assert all(check.found in text and check.advice in text for check in checks)
    assert all((check.status == "ok") == (check.advice == "") for check in checks)
    assert "None" not in text


def test_power_mode_says_how_to_leave_it() -> None:
    check = _check(probe(TREES / "agx-orin-32-jp62"), "power mode")
    assert check.status == "warn"
    assert "MODE_15W (id 1)" in check.found
    assert "2133 MHz" in check.found
    assert "nvpmodel -m 0 (MAXN)" in check.advice
    assert "nvpmodel -m 2 (MAXN_SUPER)" in _check(probe(TREES / "orin-nano-jp62"), "power mode").advice
    assert _check(probe(TREES / "agx-orin-64-jp62"), "power mode") == Check("power mode", "ok", "MAXN (id 0)")


def test_a_memory_cap_that_outlived_its_mode_is_found(tree: Path) -> None:
    (tree / "sys/kernel/nvpmodel_clk_cap/emc").write_text("2133000000\n")
    check = _check(probe(tree), "power mode")
    assert check.status == "warn"
    assert "2133 of 3199 MHz" in check.found


def test_doctor_finds_what_is_wrong() -> None:
    small, big = probe(TREES / "agx-orin-32-jp62"), probe(TREES / "agx-orin-64-jp72")
    assert _check(small, "free blocks").status == "warn"  # 1 MB in the largest blocks
    assert _check(big, "free blocks").status == "ok"  # 839 MB, more than the head of 622 MB
    assert _check(small, "temperature").status == "warn"
    assert _check(small, "swap").status == "warn"
    assert _check(big, "swap").status == "ok"
    assert _check(big, "page cache").status == "warn"
    assert _check(small, "jetson-stats").status == "warn"


def test_doctor_finds_what_is_short(tree: Path) -> None:
    """A machine of 8 GB with 1 GB to give, where tasks wait for memory, swap on a disk is more than half full, and 1 of
    the 8 GB of its control group is left."""
    names = ("memory", "memory pressure", "swap", "control group")
    assert {_check(probe(tree), name).status for name in names[:3]} == {"ok"}
    write(tree, GB, stall=25.0)
    (tree / "proc/swaps").write_text("Filename Type Size Used Priority\n/dev/nvme0n1p3 partition 8000000 5000000 -2\n")
    (tree / "proc/self/cgroup").write_text("0::/\n")
    (tree / "sys/fs/cgroup/memory.max").write_text(f"{8 * GB}\n")
    (tree / "sys/fs/cgroup/memory.current").write_text(f"{7 * GB}\n")
    found = {name: _check(probe(tree), name) for name in names}
    assert {check.status for check in found.values()} == {"warn"}
    assert "25 %" in found["memory pressure"].found
    assert "5.1 GB of 8.2 GB" in found["swap"].found


def test_unknown_release_warns_and_never_fails(tree: Path) -> None:
    (tree / "etc/nv_tegra_release").write_text("# R41 (release), REVISION: 1.2, GCID: 1, BOARD: generic\n")
    (tree / "var/lib/dpkg/status").unlink()
    facts = probe(tree)
    assert (facts.software.l4t, facts.software.jetpack) == ("41.1.2", None)
    assert "41.1.2" in facts.warnings[0]
    assert _check(facts, "release").status == "warn"
    assert "software.jetpack" in facts.unknown


def test_package_is_believed_and_a_disagreement_is_reported(tree: Path) -> None:
    (tree / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.7, GCID: 1, BOARD: generic\n")
    software = (facts := probe(tree)).software
    assert (software.jetpack, software.jetpack_package, software.jetpack_from_l4t) == ("6.2", "6.2", "6.2.1")
    assert "6.2" in facts.warnings[0]
    assert "6.2.1" in facts.warnings[0]


def test_old_jetpack_fails_for_its_tensorrt(tree: Path) -> None:
    (tree / "etc/nv_tegra_release").write_text("# R35 (release), REVISION: 6.0, GCID: 1, BOARD: t186ref, EABI: x\n")
    (tree / "var/lib/dpkg/status").write_text(
        "Package: libnvinfer8\nStatus: install ok installed\nVersion: 8.5.2-1+cuda11.4\n"
    )
    facts = probe(tree)
    assert facts.software.l4t == "35.6.0"
    assert _check(facts, "tensorrt").status == "fail"
    assert exit_code(diagnose(facts)) == 1


def test_missing_tensorrt_fails(tree: Path) -> None:
    (tree / "var/lib/dpkg/status").unlink()
    facts = probe(tree)
    assert facts.software.tensorrt is None
    assert "install nvidia-jetpack" in _check(facts, "tensorrt").advice


def test_container_without_the_nvidia_runtime(tree: Path) -> None:
    """Docker hides the device tree; the chip is still told by another file, the module by none."""
    shutil.rmtree(tree / "proc/device-tree")
    shutil.rmtree(tree / "dev")
    (tree / ".dockerenv").touch()
    facts = probe(tree)
    assert facts.is_jetson
    assert facts.identity.model == "NVIDIA Jetson AGX Orin Developer Kit"
    assert (facts.identity.soc, facts.gpus[0].sm, facts.identity.module_id) == ("tegra234", "sm_87", None)
    assert facts.memory.bandwidth_bytes_per_s is None
    assert {"identity.module_id", "memory.bandwidth_bytes_per_s"} <= set(facts.unknown)
    check = _check(facts, "container")
    assert check.status == "fail"
    assert "--runtime nvidia" in check.advice


def test_unsupported_python_fails(tree: Path) -> None:
    (tree / "usr/bin/python3.10").unlink()
    assert _check(probe(tree), "python").status == "unknown"
    (tree / "usr/bin/python3.8").touch()
    assert _check(probe(tree), "python").status == "fail"


def test_empty_tree_is_all_unknown(tmp_path: Path) -> None:
    facts = probe(tmp_path)
    assert facts.identity.kind == "linux"
    assert facts.memory.total_bytes is None
    assert "no such file" in facts.unknown["memory.total_bytes"]
    assert _check(facts, "memory").status == "unknown"
    assert report(facts, diagnose(facts))
