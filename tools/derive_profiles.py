"""The profiles that come with the package, derived: nobody measured a Jetson for them, and they say so.

    python -m tools.derive_profiles [--out profiles]

A roofline. A decode step waits for memory: its time is bytes over bandwidth. Prefill and vision wait for arithmetic:
their time is operations over half of what the tensor cores could do, and the weights are read once. Launches, host
time and everything else that only a measurement can tell are left at zero for the Jetsons.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from avl_edge.machine.profile import (
    ANY,
    VERSION,
    Costs,
    Device,
    DeviceProfile,
    Figure,
    Memory,
    Peaks,
    PowerMode,
    Record,
    save,
)

SHIPPED = Path(__file__).resolve().parents[1] / "profiles"
DATE = "2026-11-21"
GIB = 2**30
REACHED_BANDWIDTH = 156 / 204.8  # one developer's probe of the 64 GB module at MAXN
REACHED_ARITHMETIC = 0.5
TENSOR_OPERATIONS = 2048  # dense FP16 operations per clock and SM: 42.6 TFLOPS of 16 SMs at 1300.5 MHz
EMC_MHZ, EMC_15W_MHZ = 3199.0, 2133.0
BUS_BYTES = 2 * 256 // 8  # per EMC clock: double data rate, 256 bits


def derived(value: float, origin: str) -> Figure:
    return Figure(float(f"{value:.6g}"), "derived", origin)


@dataclass(frozen=True)
class Module:
    """A Jetson module: its memory on the label in GiB; SMs and GPU clock (MHz) by power mode in order of id.

    50 W, 40 W and MAXN leave all SMs on (TPC_PG_MASK 0 in nvpmodel.conf). That 15 and 30 W leave 3 and 4 TPCs, of two
    SMs each, is an assumption, and those figures say so.
    """

    device: Device
    label_gib: int
    gpu: dict[str, tuple[int, float]]


MODULES = (
    Module(
        Device("agx-orin-64", "jetson", "aarch64", ("p3701-0005",)),
        64,
        {"MAXN": (16, 1300.5), "MODE_15W": (6, 408), "MODE_30W": (8, 612), "MODE_50W": (16, 816)},
    ),
    Module(
        Device("agx-orin-32", "jetson", "aarch64", ("p3701-0004",)),
        32,
        {"MAXN": (14, 930.75), "MODE_15W": (6, 408), "MODE_30W": (8, 612), "MODE_40W": (14, 816)},
    ),
)


def jetson(module: Module, mode: str) -> DeviceProfile:
    """One module in one power mode."""
    sms, clock = module.gpu[mode]
    emc = EMC_15W_MHZ if mode == "MODE_15W" else EMC_MHZ
    paper = emc * 1e6 * BUS_BYTES
    bandwidth = paper * REACHED_BANDWIDTH
    teraflops = sms * TENSOR_OPERATIONS * clock * REACHED_ARITHMETIC / 1e6
    read = f"1000 ms / ({bandwidth / 1e9:.4g} GB/s)"
    some = "" if sms == module.gpu["MAXN"][0] else " (assumed to be on in this mode)"
    compute = f"{sms} SMs{some} x 2048 FP16 operations x {clock:g} MHz, half of it reached"
    total = module.label_gib * GIB * 62780 / 65536
    peaks = _peaks(1.0, "program, libraries and GPU context")
    return DeviceProfile(
        version=VERSION,
        name=f"{module.device.name}-{mode.lower().removeprefix('mode_')}",
        device=module.device,
        power_mode=PowerMode(list(module.gpu).index(mode), mode),
        date=DATE,
        versions={"tools.derive_profiles": "1"},
        memory=Memory(
            total_bytes=derived(total, "62780 of 65536 MiB are usable on the 64 GB module; the same share here"),
            available_bytes=derived(total - 3 * GIB, "total less 3 GiB for the system (assumption)"),
            reserve_bytes=derived(total / 10, "a tenth of the total, for cameras and other processes (choice)"),
            bandwidth_bytes_per_s=derived(
                bandwidth, "paper x 156/204.8, a published probe of the 64 GB module at MAXN"
            ),
            paper_bandwidth_bytes_per_s=derived(paper, f"EMC {emc:g} MHz x 2 x 256 bit"),
        ),
        models={ANY: Record(_costs(bandwidth, teraflops, 0, read, compute, "roofline: not counted"), peaks)},
    )


def _costs(
    bandwidth: float, teraflops: float, layer_us: float, read: str, compute: str, overhead: str, waits: bool = True
) -> Costs:
    """``waits``: a step's arithmetic is done while it waits for memory."""
    per_gb, per_tflop = derived(1e12 / bandwidth, read), derived(1000 / teraflops, compute)
    none = derived(0, overhead)
    own = {
        "decode_us_per_layer": derived(layer_us, overhead),
        "prefill_us_per_layer": derived(layer_us, overhead),
        "vision_us_per_layer": derived(layer_us, overhead),
        "decode_ms_per_tflop": derived(0, "roofline: a step waits for memory") if waits else per_tflop,
    }
    by_unit = {"gb": per_gb, "tflop": per_tflop}
    values = {}
    for each in fields(Costs):
        unit = next((by_unit[part] for part in each.name.split("_") if part in by_unit), none)
        values[each.name] = own.get(each.name, unit)
    return Costs(**values)


def _peaks(overhead_gib: float, what: str) -> Peaks:
    return Peaks(
        derived(overhead_gib * GIB, f"{what} (assumption)"),
        derived(100, "live tensors by their shapes"),
    )


def cpu(architecture: str, cores: int, ghz: float, lanes: int, paper: float, what: str) -> DeviceProfile:
    """Any machine of an architecture: assumptions, until it is profiled."""
    bandwidth = 0.6 * paper
    teraflops = cores * ghz * lanes * REACHED_ARITHMETIC / 1e3
    peaks = _peaks(0.4, "program and libraries")
    name = "cpu-x86" if architecture == "x86_64" else "cpu-arm64"
    read, compute = (
        f"1000 ms / ({bandwidth / 1e9:.4g} GB/s)",
        f"{what}: {cores} cores x {ghz} GHz x {lanes}, half of it",
    )
    return DeviceProfile(
        version=VERSION,
        name=name,
        device=Device(name, "linux", architecture),
        power_mode=None,
        date=DATE,
        versions={"tools.derive_profiles": "1"},
        memory=Memory(
            total_bytes=derived(16 * GIB, "assumption"),
            available_bytes=derived(14 * GIB, "total less 2 GiB for the system (assumption)"),
            reserve_bytes=derived(1.6 * GIB, "a tenth of the total, for other processes (choice)"),
            bandwidth_bytes_per_s=derived(bandwidth, "six tenths of paper (assumption)"),
            paper_bandwidth_bytes_per_s=derived(paper, f"{what} (assumption)"),
        ),
        models={ANY: Record(_costs(bandwidth, teraflops, 150, read, compute, "assumption", waits=False), peaks)},
    )


def profiles() -> list[DeviceProfile]:
    """All that come with the package."""
    return [
        *(jetson(module, mode) for module in MODULES for mode in module.gpu),
        cpu("x86_64", 4, 3.0, 32, 25.6e9, "AVX2, one channel of DDR4-3200"),
        cpu("aarch64", 4, 2.0, 16, 17.1e9, "NEON, 64 bits of LPDDR4-2133"),
    ]


def main(out: Annotated[Path, typer.Option(help="The folder to write to.")] = SHIPPED) -> None:
    """Write one YAML file for each device and power mode."""
    for profile in profiles():
        save(profile, out / f"{profile.name}.yaml")
        print(profile.name)


if __name__ == "__main__":
    typer.run(main)
