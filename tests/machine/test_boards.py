"""Boards as their users recorded them: what one of them says, and what holds for all of its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avl_edge.machine.device import Check, DeviceFacts, Power, Rail, diagnose, probe, report
from avl_edge.machine.device.jetson_text import parse_mode_query
from avl_edge.machine.device.known_faults import FAULTS, fault_of_tensorrt
from avl_edge.machine.device.live import parse_jtop
from avl_edge.machine.device.tegrastats import parse_tegrastats
from tests.equipment.machines import TREES, copy_of_orin

THOR = (
    "RAM 4000/125772MB CPU [1%@972] GR3D_FREQ @[300,off,600] cpu@37C VDD_GPU -392mW/-392mW VDD_CPU_SOC_MSS "
    "3924mW/3835mW VIN_SYS_5V0 5064mW/5055mW VIN 15004mW/15096mW\n"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_of_orin(tmp_path)


def check(facts: DeviceFacts, name: str) -> Check:
    return next(each for each in diagnose(facts) if each.name == name)


def board(tree: Path, l4t: str, system: str, soc: str, packages: str = "") -> DeviceFacts:
    """The recorded AGX Orin with another release and another chip."""
    major, _, revision = l4t.partition(".")
    (tree / "etc/nv_tegra_release").write_text(f"# R{major} (release), REVISION: {revision}, GCID: 1, BOARD: generic\n")
    (tree / "etc/os-release").write_text(f'PRETTY_NAME="{system}"\nNAME="{system.split()[0]}"\n')
    (tree / "proc/device-tree/compatible").write_text(f"nvidia,{soc}\0")
    (tree / "var/lib/dpkg/status").write_text(packages or "Package: none\nStatus: install ok installed\nVersion: 1\n")
    return probe(tree)


def package(name: str, version: str) -> str:
    return f"Package: {name}\nStatus: install ok installed\nVersion: {version}\n\n"


# --- rails ---


def test_thor_s_vin_is_the_whole_board(tree: Path) -> None:
    (tree / "commands/tegrastats").write_text(THOR)
    facts = probe(tree)
    assert [(rail.name, rail.power_mw) for rail in facts.power.rails] == [
        ("VDD_GPU", -392),
        ("VDD_CPU_SOC_MSS", 3924),
        ("VIN_SYS_5V0", 5064),
        ("VIN", 15004),
    ]
    assert facts.power.rails_sum_mw == 15004
    text = report(facts, diagnose(facts))
    assert "VDD_GPU -392 mW (the sensor's offset: it draws next to nothing)" in text
    assert "VIN is the whole board" in text
    assert "together" not in text


@pytest.mark.parametrize(
    ("names", "total"),
    [
        (("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), 1),  # Orin NX and Nano
        (("POM_5V_GPU", "POM_5V_IN", "POM_5V_CPU"), 2),  # Nano
        (("VDD_SYS_GPU", "VDD_SYS_SOC", "VDD_4V0_WIFI", "VDD_IN"), 8),  # TX2
        (("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"), 63),  # AGX Xavier: nothing measures the whole
        (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"), 15),  # AGX Orin: the same
    ],
)
def test_which_rail_measures_the_whole_board(names: tuple[str, ...], total: int) -> None:
    rails = tuple(Rail(name, 2**at) for at, name in enumerate(names))
    assert Power(rails=rails).rails_sum_mw == total
    line = " ".join(["RAM 1/2MB", *(f"{rail.name} {rail.power_mw}/9" for rail in rails)])
    stats = parse_tegrastats(line)
    assert stats is not None
    assert stats.rails == rails


@pytest.mark.parametrize("form", ["5517mW", "5517mW/5000mW", "5517mW/5000mW/7000mW", "5517/5000", "5517mW/5000"])
def test_a_rail_has_one_to_three_values(form: str) -> None:
    stats = parse_tegrastats(f"RAM 1/2MB (lfb 8x4MB) SWAP 165/3810MB (cached 3MB) APE 200 VDD_GPU {form} NC 0mW/0mW")
    assert stats is not None
    assert stats.rails == (Rail("VDD_GPU", 5517),)


def test_jetson_stats_takes_the_whole_board_out_of_the_rails() -> None:
    """It moves VDD_IN to the total, with its name; a total without one is a sum."""
    rail, whole = {"VDD_SOC": {"power": 1420}}, {"volt": 5000, "curr": 1050, "power": 5251, "name": "VDD_IN"}
    for total, rails in ((whole, ["VDD_IN", "VDD_SOC"]), ({"power": 1420}, ["VDD_SOC"])):
        sample = parse_jtop(json.dumps({"power": {"rail": rail, "tot": total}}))
        assert sample is not None
        assert [each.name for each in sample.rails] == rails
    thor = parse_jtop(json.dumps({"power": {"rail": {"VIN": {"power": 15004}, "VDD_GPU": {"power": -392}}}}))
    assert thor is not None
    assert Power(rails=thor.rails).rails_sum_mw == 15004


def test_the_kernel_tells_thor_s_whole_board(tree: Path) -> None:
    (tree / "commands/tegrastats").unlink()
    folder = tree / "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon9"
    folder.mkdir(parents=True)
    (folder / "in1_label").write_text("VIN\n")
    (folder / "power1_input").write_text("15004000\n")
    assert probe(tree).power.rails_sum_mw == 15004


# --- temperatures ---


def test_constants_and_sensors_of_two_names(tree: Path) -> None:
    for old in (tree / "sys/class/thermal").glob("thermal_zone*"):
        for file in old.iterdir():
            file.unlink()
    kernel = {"AO-therm": 30, "CPU-therm": 31, "GPU-therm": 29, "PLL-therm": 30, "PMIC-Die": 100, "thermal-fan-est": 30}
    for at, (name, value) in enumerate(kernel.items()):
        folder = tree / f"sys/class/thermal/thermal_zone{at}"
        folder.mkdir(exist_ok=True)
        (folder / "type").write_text(f"{name}\n")
        (folder / "temp").write_text(f"{value}000\n")
    (tree / "commands/tegrastats").write_text("RAM 1/2MB AO@30.5C CPU@24.5C PMIC@100C GPU@-256C MCPU@42.5C\n")
    facts = probe(tree)
    zones = {zone.name: zone.celsius for zone in facts.thermal.temperatures}
    assert zones == {
        "AO-therm": 30.5,
        "CPU-therm": 24.5,
        "GPU-therm": 29,
        "PLL-therm": 30,
        "thermal-fan-est": 30,
        "MCPU": 42.5,
    }
    assert check(facts, "temperature").found == "MCPU 42 C is the warmest"
    assert parse_jtop('{"temperature": {"PMIC": {"temp": 50}, "CPU": {"temp": 41}}}').temperatures[0].name == "CPU"  # type: ignore[union-attr]


# --- advice ---


@pytest.mark.parametrize(
    ("l4t", "system", "managed"),
    [
        ("36.4.3", "Ubuntu 22.04.5 LTS", False),
        ("38.2.0", "Ubuntu 24.04.3 LTS", True),
        ("39.2.0", "Ubuntu 24.04.4 LTS", True),
        ("35.6.0", "Ubuntu 20.04.6 LTS", False),
        ("36.4.3", "Debian GNU/Linux 12 (bookworm)", True),
    ],
)
def test_jetson_stats_is_installed_as_the_system_lets(tree: Path, l4t: str, system: str, managed: bool) -> None:
    for path in tree.glob("usr/local/lib/python3*/dist-packages/jtop"):
        path.rename(path.with_name("other"))
    advice = check(board(tree, l4t, system, "tegra234"), "jetson-stats").advice
    assert ("--break-system-packages" in advice) == managed


def test_modules_without_a_newer_jetpack_are_not_sent_to_one(tree: Path) -> None:
    old = package("libnvinfer8", "8.5.2-1+cuda11.4")
    xavier = check(board(tree, "35.6.0", "Ubuntu 20.04.6 LTS", "tegra194", old), "tensorrt")
    assert "JetPack 5.1 is this module's last" in xavier.advice
    assert "JetPack 6.1 or later" in check(board(tree, "35.6.0", "Ubuntu 20.04", "tegra234", old), "tensorrt").advice
    assert "JetPack 4.6 is this" in check(board(tree, "32.7.1", "Ubuntu 18.04.6 LTS", "tegra186"), "tensorrt").advice


def test_a_pc_is_not_told_what_a_jetson_is() -> None:
    facts = probe(TREES / "pc-no-gpu")
    advice = " ".join(each.advice for each in diagnose(facts))
    assert not any(word in advice for word in ("nvzramconfig", "jetson", "nvpmodel"))


def test_findings_do_not_contradict_each_other(tree: Path) -> None:
    for path in tree.glob("usr/local/lib/python3*/dist-packages/jtop"):
        path.rename(path.with_name("other"))
    (tree / "commands/jtop").write_text('{"temperature": {"CPU": {"temp": 51}}}')
    facts = probe(tree)
    assert facts.software.jetson_stats
    assert check(facts, "jetson-stats") == Check("jetson-stats", "ok", "installed; readings are from it")


# --- versions ---


def test_versions_that_are_known_to_fail_are_named_with_their_source(tree: Path) -> None:
    bad = package("libnvinfer10", "10.13.3.9-1+cuda13.0")
    found = check(board(tree, "38.2.0", "Ubuntu 24.04", "tegra264", bad), "tensorrt")
    assert found.status == "warn"
    assert "q/k/v" in found.found
    assert "TensorRT-Edge-LLM issues 105 and 151" in found.advice
    assert check(board(tree, "38.2.0", "Ubuntu 24.04", "tegra234", bad), "tensorrt").status == "ok"
    for sound in ("10.3.0.30", "10.13.3.8", "10.16.1.11"):
        assert fault_of_tensorrt("tegra264", sound) is None
    assert all(fault.source for fault in FAULTS)


@pytest.mark.parametrize(
    ("l4t", "installed", "jetpack"),
    [
        ("36.9.9", "", "6.x"),
        ("36.9.9", "6.4+b9", "6.4"),
        ("39.2.1", "7.2.1+b3", "7.2.1"),
        ("38.2.0", "7.0+b128", "7.0"),
        ("38.4.0", "7.1+b1", "7.1"),
        ("36.4.3", "6.2+b77", "6.2"),
        ("35.6.9", "5.1.9-b1", "5.1.9"),
    ],
)
def test_sound_and_newer_releases_are_named_without_a_warning(
    tree: Path, l4t: str, installed: str, jetpack: str
) -> None:
    packages = package("nvidia-jetpack", installed) if installed else ""
    facts = board(tree, l4t, "Ubuntu 24.04", "tegra234", packages)
    assert facts.software.jetpack == jetpack
    assert check(facts, "release").status == "ok"


# --- power modes ---


@pytest.mark.parametrize(
    "text",
    [
        "NV Power Mode: 15W\nNVPM WARN: fan mode is not set!\n1\n",
        "NVPM WARN: power config file\nNV Fan Mode:quiet\nNV Power Mode: 15W\n\n  1\r\n",
        "NV Power Mode: 15W\n1",
    ],
)
def test_noise_between_a_mode_and_its_id(text: str) -> None:
    assert parse_mode_query(text) == (1, "15W")


def test_without_an_id_there_is_no_mode() -> None:
    assert parse_mode_query("NV Power Mode: 15W\n") is None
    assert parse_mode_query("NV Power Mode: 15W\n" + "noise\n" * 50 + "1") is None


def super_mode(tree: Path, gpu: int, cpu_khz: int = 1_728_000) -> Check:
    """What is said of an Orin Nano in MAXN_SUPER whose GPU and CPU are allowed so much."""
    (tree / "etc/nvpmodel.conf").write_text(
        "< POWER_MODEL ID=0 NAME=15W >\nGPU MAX_FREQ 624750000\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
        "CPU_A78_0 MAX_FREQ 1728000\nGPU MAX_FREQ 1020000000\n"
    )
    (tree / "var/lib/nvpmodel/status").write_text("pmode:0002\n")
    for folder in (tree / "sys/class/devfreq").iterdir():
        (folder / "max_freq").write_text(f"{gpu}\n")
    for folder in (tree / "sys/devices/system/cpu/cpufreq").iterdir():
        (folder / "scaling_max_freq").write_text(f"{cpu_khz}\n")
    return check(probe(tree), "power mode")


def test_a_mode_that_is_set_but_not_in_force_is_said(tree: Path) -> None:
    held = super_mode(tree, 624_750_000)
    assert held.status == "warn"
    assert held.found == "MAXN_SUPER (id 2) is set but not in force: GPU at most 624.75 of 1020 MHz"
    assert "sudo nvpmodel -m 2 --force" in held.advice
    assert "CPU at most 1113.6 of 1728 MHz" in super_mode(tree, 1_020_000_000, 1_113_600).found
    assert super_mode(tree, 1_019_500_000).status == "ok"


def test_a_mode_without_a_cap_is_held_to_what_the_gpu_offers(tree: Path) -> None:
    folder = next((tree / "sys/class/devfreq").iterdir())
    (folder / "available_frequencies").write_text("306000000 612000000 1300500000\n")
    assert check(probe(tree), "power mode").status == "ok"
    (folder / "max_freq").write_text("612000000\n")
    assert "GPU at most 612 of 1300.5 MHz" in check(probe(tree), "power mode").found
