"""What a machine is: frozen data, each number with its unit in its name.

A field that could not be found is None, and ``DeviceFacts.unknown`` says why under the field's dotted name.
A field that was computed instead of read is named in ``DeviceFacts.derived`` with how it was computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Identity:
    """Which machine. ``kind`` is ``jetson`` or ``linux``; ``module_id`` like ``p3701-0005``, ``soc`` like ``tegra234``.

    ``container``: this process runs in one, and sees only what it was given.
    """

    kind: str = "linux"
    model: str | None = None
    module_id: str | None = None
    soc: str | None = None
    architecture: str | None = None
    system: str | None = None
    kernel: str | None = None
    container: bool = False


@dataclass(frozen=True)
class Software:
    """Versions as text. ``jetpack`` is the package's word, or else what the L4T release stands for; both are kept."""

    l4t: str | None = None
    jetpack: str | None = None
    jetpack_package: str | None = None
    jetpack_from_l4t: str | None = None
    cuda: str | None = None
    tensorrt: str | None = None
    nvidia_driver: str | None = None
    python: str | None = None
    compiler: str | None = None
    jetson_stats: bool = False


@dataclass(frozen=True)
class FreeBlocks:
    """The largest contiguous free blocks of memory: how many, and the size of each."""

    count: int
    block_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.count * self.block_bytes


@dataclass(frozen=True)
class Swap:
    """One swap area; ``zram`` is compressed memory, not a disk."""

    name: str
    size_bytes: int
    used_bytes: int

    @property
    def zram(self) -> bool:
        return "zram" in self.name


@dataclass(frozen=True)
class Pressure:
    """Pressure stall information: the share of time (percent) in which some or all tasks waited for memory."""

    some_avg10_percent: float
    some_avg60_percent: float
    some_avg300_percent: float
    some_total_us: int
    full_avg10_percent: float | None = None
    full_avg60_percent: float | None = None
    full_avg300_percent: float | None = None
    full_total_us: int | None = None


@dataclass(frozen=True)
class Cgroup:
    """The memory control group with the least room among this process's and its parents'.

    ``limit_bytes`` None: no limit. ``reclaimable_bytes`` is page cache that counts as used but can be had back.
    """

    version: int
    limit_bytes: int | None = None
    used_bytes: int | None = None
    reclaimable_bytes: int = 0

    @property
    def room_bytes(self) -> int | None:
        """Derived: bytes until the limit, page cache given back; None without a limit."""
        if self.limit_bytes is None:
            return None
        held = max(0, (self.used_bytes or 0) - self.reclaimable_bytes)
        return max(0, self.limit_bytes - held)


@dataclass(frozen=True)
class Memory:
    """Main memory; on a Jetson the GPU's memory too. ``bandwidth_bytes_per_s`` is on paper, never measured here."""

    total_bytes: int | None = None
    free_bytes: int | None = None
    available_bytes: int | None = None
    cached_bytes: int | None = None
    swaps: tuple[Swap, ...] = ()
    free_blocks: FreeBlocks | None = None
    cgroup: Cgroup | None = None
    pressure: Pressure | None = None
    emc_cap_hz: int | None = None
    emc_hz: int | None = None
    bandwidth_bytes_per_s: int | None = None

    @property
    def usable_bytes(self) -> int | None:
        """Derived: what a new process may take, the lesser of MemAvailable and the control group's room."""
        room = self.cgroup.room_bytes if self.cgroup else None
        known = [size for size in (self.available_bytes, room) if size is not None]
        return min(known) if known else None


@dataclass(frozen=True)
class NumaNode:
    """A memory node, its CPUs and its size."""

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int | None


@dataclass(frozen=True)
class Cpu:
    """The processors. ``online`` are ids; ``max_hz`` is the fastest clock that the present settings allow."""

    name: str | None = None
    logical: int | None = None
    cores: int | None = None
    online: tuple[int, ...] = ()
    max_hz: int | None = None
    numa: tuple[NumaNode, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """A CUDA GPU. ``sm`` like ``sm_87``; ``memory_bytes`` None for one that shares main memory (``integrated``).

    ``max_hz``: the fastest clock that the present settings allow; ``most_hz``: of all settings.
    """

    name: str
    integrated: bool = False
    sm: str | None = None
    memory_bytes: int | None = None
    cur_hz: int | None = None
    min_hz: int | None = None
    max_hz: int | None = None
    load_percent: float | None = None
    most_hz: int | None = None


@dataclass(frozen=True)
class PowerMode:
    """One mode of nvpmodel.conf. A clock None means that the mode sets no cap."""

    id: int
    name: str
    cpus: int | None = None
    cpu_max_hz: int | None = None
    gpu_max_hz: int | None = None
    emc_max_hz: int | None = None

    @property
    def unbounded(self) -> bool:
        """Is this the mode without a power budget (MAXN, MAXN_SUPER)?"""
        return self.name.upper().startswith("MAXN")


_WHOLE_BOARD = frozenset(("VDD_IN", "POM_5V_IN", "VIN"))
"""Orin NX and Nano, Xavier NX and TX2; Nano; AGX Thor. ``VIN_SYS_5V0`` is what the board's 5 V draw, a part."""


@dataclass(frozen=True)
class Rail:
    """A power rail that the board measures; ``power_mw`` is volts times amperes where only those are read. Below 0 it
    is the sensor's offset: the rail draws next to nothing."""

    name: str
    power_mw: int
    voltage_mv: int | None = None
    current_ma: int | None = None


@dataclass(frozen=True)
class Power:
    """``mode_id`` and ``mode_name`` are the mode in force; ``modes`` are those that the device offers."""

    mode_id: int | None = None
    mode_name: str | None = None
    modes: tuple[PowerMode, ...] = ()
    rails: tuple[Rail, ...] = ()

    @property
    def mode(self) -> PowerMode | None:
        """The mode in force, where nvpmodel.conf describes it."""
        return next((mode for mode in self.modes if mode.id == self.mode_id), None)

    @property
    def whole_board(self) -> Rail | None:
        """The rail that measures all that the board draws, of which every other is a part; None where none does (AGX
        Orin, AGX Xavier)."""
        return next((rail for rail in self.rails if rail.name.upper() in _WHOLE_BOARD), None)

    @property
    def rails_sum_mw(self) -> int | None:
        """Derived: what :attr:`whole_board` measures, or else the sum of the rails, which is less than what the board
        draws."""
        whole = self.whole_board
        if whole:
            return whole.power_mw
        return sum(rail.power_mw for rail in self.rails) if self.rails else None


@dataclass(frozen=True)
class Temperature:
    """A sensor; ``limit_celsius`` is where the kernel begins to slow the machine down."""

    name: str
    celsius: float
    limit_celsius: float | None = None


@dataclass(frozen=True)
class Thermal:
    """``throttling`` names the alerts that are active now."""

    temperatures: tuple[Temperature, ...] = ()
    throttling: tuple[str, ...] = ()


_DERIVED = {
    "memory.usable_bytes": "the lesser of MemAvailable and the control group's room",
    "memory.cgroup.room_bytes": "limit - (used - reclaimable)",
    "power.rails_sum_mw": "the rail of the whole board (VDD_IN, POM_5V_IN or VIN), or else the sum of the rails, which "
    "is less than what the board draws",
}


@dataclass(frozen=True)
class DeviceFacts:
    """All of it. ``telemetry`` says where rails and temperatures came from: jetson-stats, tegrastats or sysfs."""

    root: str
    identity: Identity = field(default_factory=Identity)
    software: Software = field(default_factory=Software)
    memory: Memory = field(default_factory=Memory)
    cpu: Cpu = field(default_factory=Cpu)
    gpus: tuple[Gpu, ...] = ()
    gpu_nodes: bool = False
    power: Power = field(default_factory=Power)
    thermal: Thermal = field(default_factory=Thermal)
    telemetry: str = "sysfs"
    unknown: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def is_jetson(self) -> bool:
        return self.identity.kind == "jetson"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and the values derived from them."""
        content = asdict(self)
        content["derived"] = {**self.derived, **_DERIVED}
        content["memory"]["usable_bytes"] = self.memory.usable_bytes
        if self.memory.cgroup:
            content["memory"]["cgroup"]["room_bytes"] = self.memory.cgroup.room_bytes
        content["power"]["rails_sum_mw"] = self.power.rails_sum_mw
        return content
