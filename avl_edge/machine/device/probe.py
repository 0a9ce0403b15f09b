"""What machine is this: reads a machine's files, or a recorded file tree's, into :class:`DeviceFacts`."""

from __future__ import annotations

from pathlib import Path

from .facts import Cgroup, Cpu, DeviceFacts, Identity, Memory, NumaNode, Power, Thermal
from .finder import Finder
from .jetson_text import parse_chip_id, parse_model, parse_module_id, parse_release, parse_soc
from .linux_text import (
    CpuInfo,
    MemInfo,
    parse_buddyinfo,
    parse_byte_count,
    parse_cpu_list,
    parse_cpuinfo,
    parse_limit,
    parse_meminfo,
    parse_os_release,
    parse_own_cgroups,
    parse_pressure,
    parse_reclaimable,
    parse_swaps,
)
from .probe_gpu import find_gpus, has_gpu_nodes
from .probe_jetson import Telemetry, find_bandwidth, find_emc_cap, find_power, find_telemetry, find_thermal
from .probe_software import find_software, page_bytes
from .tegrastats import parse_tegrastats
from .tree import Tree
from .values import hertz_of_khz, line_of


def probe(root: str | Path = "/") -> DeviceFacts:
    """The facts of this machine ("/") or of a recorded file tree.

    Whatever the files hold, a fact that cannot be had is None with a reason in ``unknown``.
    Raises :class:`~avl_edge.errors.BadInput` only if ``root`` is not a folder.
    """
    find = Finder(Tree(root))
    identity = find_identity(find)
    jetson = identity.kind == "jetson"
    telemetry = find_telemetry(find) if jetson else Telemetry()
    return DeviceFacts(
        root=str(find.tree.root),
        identity=identity,
        software=find_software(find, identity, telemetry.source),
        memory=find_memory(find, identity, telemetry),
        cpu=find_cpu(find),
        gpus=find_gpus(find, identity),
        gpu_nodes=has_gpu_nodes(find),
        power=find_power(find, jetson, telemetry),
        thermal=find_thermal(find, telemetry),
        telemetry=telemetry.source,
        unknown=find.unknown,
        derived=find.derived,
        warnings=tuple(find.warnings),
    )


def read_memory(root: str | Path = "/") -> Memory:
    """Only the memory, for who looks again and again: no program is asked, no clock and no bandwidth is told."""
    return find_memory(Finder(Tree(root)), Identity(), Telemetry())


def read_shortage(root: str | Path = "/") -> Memory:
    """Only what tells that memory is short, for who asks many times a second: three files, and the control group's."""
    find = Finder(Tree(root))
    info = find.quietly("/proc/meminfo", parse_meminfo) or MemInfo(None, None, None, None)
    stall = find.quietly("/proc/pressure/memory", parse_pressure)
    return Memory(info.total_bytes, available_bytes=info.available_bytes, cgroup=find_cgroup(find), pressure=stall)


def read_machine(root: str | Path = "/") -> DeviceFacts:
    """Only what tells which profile holds and whether the machine is slowed down: identity, memory, processors, power
    mode and thermal alerts. No program is asked, but for the power mode where no file tells it."""
    find = Finder(Tree(root))
    identity = find_identity(find)
    return DeviceFacts(
        root=str(find.tree.root),
        identity=identity,
        memory=find_memory(find, Identity(), Telemetry()),
        cpu=find_cpu(find),
        power=find_power(find, identity.kind == "jetson", Telemetry()),
        thermal=find_thermal(find, Telemetry()),
        unknown=find.unknown,
        derived=find.derived,
    )


def read_power(root: str | Path = "/") -> Power:
    """Only the power mode and the rails of a Jetson, read anew."""
    return find_power(Finder(Tree(root)), True, Telemetry())


def read_thermal(root: str | Path = "/") -> Thermal:
    """Only the temperatures and the alerts, read anew from the kernel."""
    return find_thermal(Finder(Tree(root)), Telemetry())


def find_identity(find: Finder) -> Identity:
    """A machine with an L4T release or a Tegra chip is a Jetson."""
    release = find.quietly("/etc/nv_tegra_release", parse_release)
    module = find.quietly("/proc/device-tree/compatible", parse_module_id)
    soc = find.quietly("/proc/device-tree/compatible", parse_soc)
    if soc is None and find.quietly("/sys/devices/soc0/family", line_of) == "Tegra":
        soc = find.quietly("/sys/devices/soc0/soc_id", parse_chip_id) or "tegra"
        find.derived["identity.soc"] = "from the chip id of /sys/devices/soc0"
    jetson = bool(release or soc or module)
    if jetson and module is None:
        find.unknown["identity.module_id"] = "/proc/device-tree/compatible names no module, or a container hides it"
    cpu = find.quietly("/proc/cpuinfo", parse_cpuinfo)
    return Identity(
        kind="jetson" if jetson else "linux",
        model=_find_model(find, jetson),
        module_id=module,
        soc=soc,
        architecture=cpu.architecture if cpu else None,
        system=find.first("identity.system", ("/etc/os-release", parse_os_release)),
        kernel=find.first("identity.kernel", ("/proc/sys/kernel/osrelease", line_of)),
        container=_in_container(find),
    )


def _find_model(find: Finder, jetson: bool) -> str | None:
    if jetson:
        sources = ("/proc/device-tree/model", "/sys/devices/soc0/machine")
    else:
        sources = ("/sys/devices/virtual/dmi/id/product_name", "/proc/device-tree/model")
    return find.first("identity.model", *((source, parse_model) for source in sources))


def _in_container(find: Finder) -> bool:
    """Docker and podman leave a file; container managers name themselves in the first process's control group."""
    if find.tree.exists("/.dockerenv") or find.tree.exists("/run/.containerenv"):
        return True
    groups = find.quietly("/proc/1/cgroup", lambda text: text) or ""
    return any(name in groups for name in ("/docker", "/kubepods", "/containerd", "/libpod", "/lxc"))


def find_memory(find: Finder, identity: Identity, telemetry: Telemetry) -> Memory:
    """Sizes, free blocks, control group and pressure; on a Jetson the memory clock and what follows from it."""
    info = find.first("memory.total_bytes", ("/proc/meminfo", parse_meminfo)) or MemInfo(None, None, None, None)
    if info.total_bytes is not None and info.available_bytes is None:
        find.unknown["memory.available_bytes"] = "/proc/meminfo does not tell MemAvailable"
    jetson = identity.kind == "jetson"
    page = page_bytes(find)
    blocks = find.first(
        "memory.free_blocks",
        ("/proc/buddyinfo", lambda text: parse_buddyinfo(text, page)),
        *((("tegrastats", lambda text: (stats := parse_tegrastats(text)) and stats.free_blocks),) if jetson else ()),
    )
    cap = find_emc_cap(find) if jetson else None
    return Memory(
        total_bytes=info.total_bytes,
        free_bytes=info.free_bytes,
        available_bytes=info.available_bytes,
        cached_bytes=info.cached_bytes,
        swaps=find.first("memory.swaps", ("/proc/swaps", parse_swaps)) or (),
        free_blocks=blocks,
        cgroup=find_cgroup(find),
        pressure=find.first("memory.pressure", ("/proc/pressure/memory", parse_pressure)),
        emc_cap_hz=cap,
        emc_hz=telemetry.emc_hz,
        bandwidth_bytes_per_s=find_bandwidth(find, identity, cap) if jetson else None,
    )


def find_cgroup(find: Finder) -> Cgroup | None:
    """The control group, among this process's own and all above it, that leaves the least room."""
    own = find.quietly("/proc/self/cgroup", parse_own_cgroups) or {1: "/", 2: "/"}
    groups = [group for version, path in own.items() for group in _cgroup_chain(find, version, path)]
    if not groups:
        find.unknown["memory.cgroup"] = "no memory control group under /sys/fs/cgroup"
        return None
    limited = [group for group in groups if group.limit_bytes is not None]
    return min(limited, key=lambda group: group.room_bytes or 0) if limited else groups[0]


def _cgroup_chain(find: Finder, version: int, path: str) -> list[Cgroup]:
    """From the process's group up to the hierarchy's root; inside a container the path above may not be visible."""
    base = "/sys/fs/cgroup/memory" if version == 1 else "/sys/fs/cgroup"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    parts = [part for part in path.split("/") if part][:64]
    found = []
    for depth in range(len(parts), -1, -1):
        folder = "/".join([base, *parts[:depth]])
        limit = find.quietly(f"{folder}/{names[0]}", parse_limit)
        if limit is not None:
            used = find.quietly(f"{folder}/{names[1]}", parse_byte_count)
            stat = find.quietly(f"{folder}/memory.stat", parse_reclaimable)
            found.append(Cgroup(version, limit[0], used, stat or 0))
    return found


def find_cpu(find: Finder) -> Cpu:
    """Name, counts, clock and memory nodes of the processors."""
    info = find.first("cpu.name", ("/proc/cpuinfo", parse_cpuinfo)) or CpuInfo(None, None, 0, 0)
    if info.name and info.architecture == "aarch64":
        find.derived["cpu.name"] = "from the implementer and part numbers of /proc/cpuinfo"
    online = find.first("cpu.online", ("/sys/devices/system/cpu/online", parse_cpu_list)) or ()
    policies = find.tree.glob("/sys/devices/system/cpu/cpufreq/policy*")
    clocks = [find.quietly(f"{policy}/scaling_max_freq", hertz_of_khz) for policy in policies]
    fastest = max((clock for clock in clocks if clock), default=None)
    if fastest is None:
        find.unknown["cpu.max_hz"] = "no cpufreq policy tells a clock"
    return Cpu(
        name=info.name,
        logical=len(online) or info.logical or None,
        cores=info.cores or None,
        online=online,
        max_hz=fastest,
        numa=_find_numa(find),
    )


def _find_numa(find: Finder) -> tuple[NumaNode, ...]:
    found = []
    for folder in find.tree.glob("/sys/devices/system/node/node[0-9]*"):
        number = folder.rpartition("/node")[2]
        cpus = find.quietly(f"{folder}/cpulist", parse_cpu_list) or ()
        memory = find.quietly(f"{folder}/meminfo", parse_meminfo)
        if number.isascii() and number.isdigit() and len(number) < 6:
            found.append(NumaNode(int(number), cpus, memory.total_bytes if memory else None))
    return tuple(found)
