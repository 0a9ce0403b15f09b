"""Parsers of `machine.device`: the forms that are known, and any text at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, is_dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.machine.device import jetson_text, linux_text, live, nvidia_text, tegrastats, values
from avl_edge.machine.device.facts import FreeBlocks, Swap
from tests.equipment.machines import ORIN, TREES

LINE = (ORIN / "commands/tegrastats").read_text()

Parser = Callable[[str], object]

JTOP = '{"temperature": {"CPU": {"temp": 51}}, "power": {"rail": {"A": {"power": 4}}}, "memory": {"EMC": {"cur": 9e3}}}'
SAMPLES: list[tuple[Parser, str]] = [
    (jetson_text.parse_release, (ORIN / "etc/nv_tegra_release").read_text()),
    (jetson_text.parse_model, (ORIN / "proc/device-tree/model").read_text()),
    (jetson_text.parse_module_id, (ORIN / "proc/device-tree/compatible").read_text()),
    (jetson_text.parse_soc, (ORIN / "proc/device-tree/compatible").read_text()),
    (jetson_text.parse_chip_id, "35\n"),
    (jetson_text.parse_mode_id, "pmode:0000\n"),
    (jetson_text.parse_mode_query, "NV Power Mode: MODE_30W\n2\n"),
    (jetson_text.parse_default_mode, "< PM_CONFIG DEFAULT=2 >"),
    (jetson_text.parse_power_modes, (ORIN / "etc/nvpmodel.conf").read_text()[-900:]),
    (tegrastats.parse_tegrastats, LINE),
    (linux_text.parse_meminfo, (ORIN / "proc/meminfo").read_text()),
    (linux_text.parse_swaps, (ORIN / "proc/swaps").read_text()),
    (linux_text.parse_pressure, (ORIN / "proc/pressure/memory").read_text()),
    (linux_text.parse_buddyinfo, (TREES / "pc-gpu/proc/buddyinfo").read_text()),
    (linux_text.parse_cpuinfo, (ORIN / "proc/cpuinfo").read_text()[:700]),
    (linux_text.parse_cpuinfo, (TREES / "pc-gpu/proc/cpuinfo").read_text()[:700]),
    (linux_text.parse_cpu_list, "0-3,8-11\n"),
    (linux_text.parse_own_cgroups, "4:cpu,memory:/docker/0123\n0::/init.scope\n"),
    (linux_text.parse_limit, "8589934592\n"),
    (linux_text.parse_byte_count, "8589934592\n"),
    (linux_text.parse_reclaimable, (TREES / "container-limit/sys/fs/cgroup/memory.stat").read_text()),
    (linux_text.parse_packages, (ORIN / "var/lib/dpkg/status").read_text()[:700]),
    (linux_text.parse_os_release, (ORIN / "etc/os-release").read_text()),
    (nvidia_text.upstream_version, "10.3.0.30-1+cuda12.5"),
    (nvidia_text.parse_cuda_version, (ORIN / "usr/local/cuda/version.json").read_text()),
    (nvidia_text.parse_driver_version, (TREES / "pc-gpu/proc/driver/nvidia/version").read_text()),
    (nvidia_text.parse_gpu_information, "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   \t\t 152\n"),
    (nvidia_text.parse_nvidia_smi, "NVIDIA GeForce RTX 4090, 8.9, 24564 MiB, 550.54.14\n"),
    (live.parse_jtop, JTOP),
    (values.hertz, "1300500000\n"),
    (values.hertz_of_khz, "2201600\n"),
    (values.celsius, "73.625"),
    (values.celsius_of_milli, "73625\n"),
    (values.bytes_of_kib, "64286720"),
    (values.line_of, "ina3221\n"),
]
NAMES = [f"{parse.__module__.rpartition('.')[2]}.{parse.__name__}" for parse, _ in SAMPLES]


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(entry) for key, entry in asdict(value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value


def _sane(value: object) -> bool:
    """Every number finite, and of a size that a machine can have."""
    if isinstance(value, dict):
        return all(_sane(entry) for entry in value.values())
    if isinstance(value, list):
        return all(_sane(entry) for entry in value)
    return not isinstance(value, (int, float)) or (math.isfinite(value) and abs(value) <= 2**61)


@st.composite
def _damaged(draw: st.DrawFn, text: str) -> str:
    """A real text with pieces cut out, doubled or overwritten."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        junk = st.sampled_from(
            ["", "-", "9" * 25, "9" * 5000, "\0", "\n", "=", "]", "@", "None", "1e999", "\u0663", " "]
        )
        piece = draw(st.one_of(junk, st.text(max_size=12), st.just(text[start:end] * 2)))
        text = text[:start] + piece + text[end:]
    return text


@pytest.mark.parametrize(("parse", "sample"), SAMPLES, ids=NAMES)
def test_the_sample_is_understood(parse: Parser, sample: str) -> None:
    assert parse(sample) is not None


@pytest.mark.parametrize(("parse", "sample"), SAMPLES, ids=NAMES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_text_is_survived(parse: Parser, sample: str, data: st.DataObject) -> None:
    text = data.draw(st.one_of(st.text(max_size=300), _damaged(sample), _damaged(LINE)))
    plain = _plain(parse(text))
    json.dumps(plain, allow_nan=False)
    assert _sane(plain)


@pytest.mark.parametrize("parse", [parse for parse, _ in SAMPLES], ids=NAMES)
def test_absurd_texts_are_survived(parse: Parser) -> None:
    for text in ("", "\0" * 100, "9" * 100_000, "\n" * 50_000, " " * 50_000 + "x", "a:" * 30_000, "RAM " * 20_000):
        parse(text)


def test_tegrastats_line_of_an_agx_orin() -> None:
    stats = tegrastats.parse_tegrastats(LINE)
    assert stats is not None
    assert (stats.ram_used_bytes, stats.ram_total_bytes) == (13983 * 2**20, 62780 * 2**20)
    assert stats.free_blocks == FreeBlocks(424, 4 * 2**20)
    assert (stats.swap_used_bytes, stats.swap_total_bytes) == (126 * 2**20, 31390 * 2**20)
    loads = [cpu and (cpu.percent, cpu.hz) for cpu in stats.cpus]
    assert loads == [(90, 2_201_000_000), None, (3, 729_000_000)]
    assert (stats.emc_percent, stats.emc_hz) == (1, 2_133_000_000)
    assert (stats.gpu_percent, stats.gpu_hz) == (14, (407_000_000, 407_000_000))
    assert [(zone.name, zone.celsius) for zone in stats.temperatures] == [("CV0", 73.625), ("tj", 77.281)]
    rails = {"VDD_GPU_SOC": 3150, "VDD_CPU_CV": 14312, "VIN_SYS_5V0": 4968, "VDDQ_VDD2_1V8AO": 1091}
    assert {rail.name: rail.power_mw for rail in stats.rails} == rails


@pytest.mark.parametrize(
    ("text", "percent", "clocks"),
    [
        ("GR3D_FREQ 14%", 14, ()),
        ("GR3D_FREQ 99%@408", 99, (408_000_000,)),
        ("GR3D_FREQ 0%@[305]", 0, (305_000_000,)),
        ("GR3D_FREQ 14%@[407,407]", 14, (407_000_000, 407_000_000)),
        ("GR3D_FREQ 0%@[0,0]", 0, (None, None)),
        ("GR3D_FREQ @[300,off,600]", None, (300_000_000, None, 600_000_000)),
        ("GR3D_FREQ @[0, 300, 400]", None, (None, 300_000_000, 400_000_000)),
        ("GR3D_FREQ 5% @[N/A,,612]", 5, (None, None, 612_000_000)),
        ("GR3D_FREQ @1300", None, (1_300_000_000,)),
        ("GR3D_FREQ 999%@999999", None, (None,)),
        ("no engine here", None, ()),
    ],
)
def test_forms_of_the_gpu_load(text: str, percent: int | None, clocks: tuple[int | None, ...]) -> None:
    stats = tegrastats.parse_tegrastats(f"RAM 1/2MB {text} VIC_FREQ 115")
    assert stats is not None
    assert (stats.gpu_percent, stats.gpu_hz) == (percent, clocks)


def test_zones_in_any_case_without_power_and_nano_rails() -> None:
    rails = "VDD_IN 5251/5535 VDD_CPU_GPU_CV 512mW/944mW NC 0mW/0mW"
    line = f"RAM 1/2MB CPU [1%,off]@1500 CPU@-256C cpu@48.5C Tboard@32C {rails}"
    stats = tegrastats.parse_tegrastats(line)
    assert stats is not None
    assert [(zone.name, zone.celsius) for zone in stats.temperatures] == [("cpu", 48.5), ("Tboard", 32.0)]
    assert [(rail.name, rail.power_mw) for rail in stats.rails] == [("VDD_IN", 5251), ("VDD_CPU_GPU_CV", 512)]
    assert [cpu and cpu.hz for cpu in stats.cpus] == [1_500_000_000, None]


def test_last_line_counts_and_other_lines_do_not() -> None:
    stats = tegrastats.parse_tegrastats(f"RAM 1/2MB\nRAM 2/2MB\nunable to open\n{LINE}\ngarbage")
    assert stats is not None
    assert stats.ram_total_bytes == 62780 * 2**20
    assert tegrastats.parse_tegrastats("nothing of the kind") is None
    assert tegrastats.parse_tegrastats("RAM 3/2MB") is not None  # absurd: known to be a line, its RAM is not believed


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: x", "36.4.3"),
        ("# R35 (release), REVISION: 6.0, GCID: 37391689, BOARD: t186ref, EABI: aarch64", "35.6.0"),
        ("# R39 (release), REVISION: 2.0", "39.2.0"),
        ("# R36 (release)", None),
    ],
)
def test_releases(text: str, release: str | None) -> None:
    assert jetson_text.parse_release(text) == release


def test_releases_that_are_known() -> None:
    known = {"36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.4.7": "6.2.1", "36.5.0": "6.2.2", "39.2.0": "7.2"}
    assert {l4t: jetson_text.jetpack_of_l4t(l4t) for l4t in known} == known
    assert jetson_text.jetpack_of_l4t("38.2.0") == "7.0 or 7.1"
    assert jetson_text.jetpack_of_l4t("40.0.0") is None


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0", "p3701-0005"),
        ("nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0", "p3767-0005"),
        ("nvidia,p3737-0000+p3701-0004\0nvidia,tegra234\0", "p3701-0004"),
        ("nvidia,p2972-0000\0nvidia,tegra194\0", None),
        ("nvidia,p2771-0000\0nvidia,tegra186\0", None),
        ("nvidia,p3450-0000\0nvidia,jetson-nano\0nvidia,tegra210\0", None),
        ("nvidia,p3509-0000+p3668-0001\0nvidia,p3509-0000\0nvidia,tegra194\0", "p3668-0001"),
        ("nvidia,p2822-0000+p2888-0004\0nvidia,tegra194\0", "p2888-0004"),
        ("nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0", "p3834-0008"),
        ("nvidia,p5000-0000+p5001-0003\0nvidia,tegra999\0", "p5001-0003"),
        ("raspberrypi,5-model-b\0brcm,bcm2712\0", None),
    ],
)
def test_modules(text: str, module: str | None) -> None:
    assert jetson_text.parse_module_id(text) == module


def test_power_modes_in_any_order_and_without_caps() -> None:
    first = "  < POWER_MODEL NAME=MAXN ID=3 >\nGPU MAX_FREQ -1\n#GPU MAX_FREQ 1\n"
    text = f"{first}< POWER_MODEL ID=x NAME=Y >\n< PM_CONFIG DEFAULT=3 >"
    modes = jetson_text.parse_power_modes(text)
    assert modes is not None
    assert [(mode.id, mode.name, mode.gpu_max_hz, mode.cpus) for mode in modes] == [(3, "MAXN", None, None)]
    assert jetson_text.parse_default_mode(text) == 3
    assert jetson_text.parse_mode_query("NV Fan Mode:quiet\nNV Power Mode: MAXN\n0\n") == (0, "MAXN")
    assert jetson_text.parse_mode_id("pmode:0002 fmode:quiet") == 2


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("max\n", (None,)),
        ("9223372036854771712\n", (None,)),
        ("18446744073709551615", (None,)),
        ("1024", (1024,)),
        ("-1", None),
        ("", None),
        ("lots", None),
    ],
)
def test_limits(text: str, limit: tuple[int | None] | None) -> None:
    assert linux_text.parse_limit(text) == limit


def test_memory_that_cannot_be() -> None:
    info = linux_text.parse_meminfo("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 2000 kB\n")
    assert info is not None
    assert (info.total_bytes, info.free_bytes, info.available_bytes) == (1_024_000, 10_240, None)
    assert linux_text.parse_meminfo("MemTotal: 99999999999999999999 kB\n") is None
    assert linux_text.parse_meminfo("MemTotal: 0 kB\n") is None


def test_free_blocks() -> None:
    text = "Node 0, zone DMA 1 1 0\nNode 0, zone Normal 5 7 2\nNode 1, zone Normal 0 0 3\n"
    assert linux_text.parse_buddyinfo(text) == FreeBlocks(5, 4 * 4096)
    assert linux_text.parse_buddyinfo(text, page_bytes=65536) == FreeBlocks(5, 4 * 65536)
    assert linux_text.parse_buddyinfo("Node 0, zone DMA 0 0 0") == FreeBlocks(0, 4096)


def test_pressure_and_swaps() -> None:
    pressure = linux_text.parse_pressure("some avg10=1.50 avg60=0.20 avg300=0.00 total=125440\n")
    assert pressure is not None
    assert (pressure.some_avg10_percent, pressure.some_total_us, pressure.full_avg10_percent) == (1.5, 125440, None)
    assert linux_text.parse_pressure("full avg10=1.50 avg60=0.20 avg300=0.00 total=1\n") is None
    assert linux_text.parse_pressure("some avg10=101.00 avg60=0.20 avg300=0.00 total=1\n") is None
    swaps = linux_text.parse_swaps(
        "Filename Type Size Used Priority\n/dev/zram0 partition 8 4 5\n/swap.img file 16 0 -2\n"
    )
    assert swaps == (Swap("/dev/zram0", 8192, 4096), Swap("/swap.img", 16384, 0))
    assert swaps[0].zram


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("0-2,5", (0, 1, 2, 5)),
        ("7", (7,)),
        ("3-1", None),
        ("0-99999999999", None),
        ("a", None),
        ("", None),
        ("-1", None),
    ],
)
def test_cpu_lists(text: str, ids: tuple[int, ...] | None) -> None:
    assert linux_text.parse_cpu_list(text) == ids


def test_packages_that_are_installed() -> None:
    found = linux_text.parse_packages((ORIN / "var/lib/dpkg/status").read_text())
    assert found is not None
    assert found["nvidia-jetpack"] == "6.2+b77"
    assert "cuda-cudart-11-4" not in found  # removed, only its settings are left
    assert nvidia_text.cuda_of_packages(found) == "12.6"
    assert nvidia_text.cuda_of_packages({"cuda-cudart-12-6": "", "cuda-cudart-13-2": ""}) == "13.2"
    assert nvidia_text.tensorrt_of_packages({"libnvinfer8": "8.6.1", "libnvinfer10": "10.16.1-1"}) == "10.16.1"
    assert nvidia_text.jetpack_of_packages({"nvidia-jetpack-runtime": "7.2-b187"}) == "7.2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVIDIA H100 NVL, 9.0, 95830 MiB, 550.54.14", ("NVIDIA H100 NVL", "sm_90", 95830 * 2**20, "550.54.14")),
        ("Tesla T4, 7.5, 15360, 535.0", ("Tesla T4", "sm_75", 15360 * 2**20, "535.0")),
        ("Orin (nvgpu), 8.7, [N/A], 540.4.0", ("Orin (nvgpu)", "sm_87", None, "540.4.0")),
    ],
)
def test_nvidia_smi(text: str, expected: tuple[str, str, int | None, str]) -> None:
    found = nvidia_text.parse_nvidia_smi(f"{text}\nnot a line\n")
    assert found is not None
    ((gpu, driver),) = found
    assert (gpu.name, gpu.sm, gpu.memory_bytes, driver) == expected


def test_drivers() -> None:
    old = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  390.48  Thu Mar 22 00:42:57 PDT 2018\nGCC version: 5\n"
    new = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@x)\n"
    assert nvidia_text.parse_driver_version(old) == "390.48"
    assert nvidia_text.parse_driver_version(new) == "540.4.0"


def test_arm_cores_have_names() -> None:
    cpu = "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nCPU implementer\t: 0x41\nCPU part\t: {}\n"
    names = [linux_text.parse_cpuinfo(cpu.format(part)) for part in ("0xd42", "0xfff", "rubbish")]
    assert [info and info.name for info in names] == [
        "Cortex-A78AE",
        "Arm implementer 0x41 part 0xfff",
        "ARMv8 Processor rev 1 (v8l)",
    ]
