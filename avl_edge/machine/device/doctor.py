"""Checks for people: what is right or wrong with a machine for this program, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ...config import format_size
from . import advice
from .facts import DeviceFacts
from .jetson_text import memory_bus
from .known_faults import fault_of_tensorrt
from .nvidia_text import version_key

OLDEST_TENSORRT = "10.3"
_IN_FORCE = 0.98
"""Of a mode's clock: what counts as the same; drivers round to their own steps."""
PYTHONS = ("3.10", "3.11", "3.12")

# The fp16 head of the largest vocabulary that is common (151,936 x 2048): the one big allocation of a load.
_BIG_ALLOCATION_BYTES = 151_936 * 2048 * 2
_FREE_BLOCKS_ADVICE = (
    "before loading a model: sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory'"
)


@dataclass(frozen=True)
class Check:
    """One line of the checklist. ``status`` is ok, warn, fail or unknown; ``advice`` is empty where all is well."""

    name: str
    status: str
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def diagnose(facts: DeviceFacts) -> tuple[Check, ...]:
    """The checklist for these facts, in the order in which to read it."""
    always = (_python, _compiler, _memory, _pressure, _cgroup, _swap, _temperature)
    jetson = (_release, _power_mode, _tensorrt, _container, _free_blocks, _page_cache, _jetson_stats)
    found = (check(facts) for check in (jetson + always if facts.is_jetson else (_gpu, *always)))
    return tuple(check for check in found if check is not None)


def exit_code(checks: Iterable[Check]) -> int:
    """0 if nothing failed, else 1; what is unknown or only slow is no failure."""
    return int(any(check.status == "fail" for check in checks))


def _release(facts: DeviceFacts) -> Check:
    software = facts.software
    found = f"L4T {software.l4t or 'unknown'}, JetPack {software.jetpack or 'unknown'}"
    if facts.warnings:
        cure = "apt-cache policy nvidia-jetpack tells what is installed; engines and profiles are bound to it"
        return Check("release", "warn", f"{found}; {'; '.join(facts.warnings)}", cure)
    if software.l4t is None:
        reason = facts.unknown.get("software.l4t", "")
        return Check("release", "unknown", f"{found} ({reason})", "in a container, mount /etc/nv_tegra_release")
    return Check("release", "ok", found)


def _power_mode(facts: DeviceFacts) -> Check:
    power = facts.power
    if power.mode_id is None:
        reason = facts.unknown.get("power.mode_id", "")
        return Check("power mode", "unknown", reason, "sudo nvpmodel -q tells the mode")
    found = f"{power.mode_name or 'mode'} (id {power.mode_id})"
    held = _held_below(facts)
    if held:
        force = f"sudo nvpmodel -m {power.mode_id} --force, then restart: some clocks change with a restart alone"
        return Check("power mode", "warn", f"{found} is set but not in force: {', '.join(held)}", force)
    if power.mode_name and power.mode_name.upper().startswith("MAXN"):
        return _unbounded_mode(facts, found)
    best = max((mode for mode in power.modes if mode.unbounded), key=lambda mode: len(mode.name), default=None)
    if best is None:
        return Check("power mode", "unknown", f"{found}; no MAXN in /etc/nvpmodel.conf", "sudo nvpmodel -p --verbose")
    mine = power.mode
    clocks = (("GPU", mine and mine.gpu_max_hz), ("memory", mine and mine.emc_max_hz))
    caps = [f"{name} at most {clock / 1e6:g} MHz" for name, clock in clocks if clock]
    return Check(
        "power mode",
        "warn",
        "; ".join([found, *caps]),
        f"for full speed: sudo nvpmodel -m {best.id} ({best.name}); it draws more power and heat, may ask for a "
        f"reboot, and budgets that were profiled in this mode do not hold in it",
    )


def _held_below(facts: DeviceFacts) -> list[str]:
    """Clocks that the settings hold below what the mode in force allows, where it says so."""
    mode, gpu = facts.power.mode, facts.gpus[0] if facts.gpus else None
    if mode is None:
        return []
    clocks = (
        ("GPU", gpu and gpu.max_hz, mode.gpu_max_hz or (gpu and mode.unbounded and gpu.most_hz)),
        ("CPU", facts.cpu.max_hz, mode.cpu_max_hz),
    )
    return [
        f"{name} at most {now / 1e6:g} of {then / 1e6:g} MHz"
        for name, now, then in clocks
        if now and then and now < _IN_FORCE * then
    ]


def _unbounded_mode(facts: DeviceFacts, found: str) -> Check:
    """A cap on the memory clock can outlive the mode that set it."""
    bus = memory_bus(facts.identity.module_id or "")
    cap = facts.memory.emc_cap_hz
    if bus is None or bus.max_hz is None or cap is None or cap >= bus.max_hz:
        return Check("power mode", "ok", found)
    slow = f"{found}, but the memory clock is held at {cap / 1e6:g} of {bus.max_hz / 1e6:g} MHz"
    cure = f"set the mode anew: sudo nvpmodel -m {facts.power.mode_id} --force, then sudo jetson_clocks"
    return Check("power mode", "warn", slow, cure)


def _tensorrt(facts: DeviceFacts) -> Check:
    cuda = f"CUDA {facts.software.cuda or 'unknown'}"
    tensorrt = facts.software.tensorrt
    if tensorrt is None:
        return Check("tensorrt", "fail", f"not installed; {cuda}", advice.missing_tensorrt(facts, OLDEST_TENSORRT))
    found = f"TensorRT {tensorrt}, {cuda}"
    if version_key(tensorrt) < version_key(OLDEST_TENSORRT):
        return Check("tensorrt", "fail", found, advice.newer_tensorrt(facts, OLDEST_TENSORRT))
    fault = fault_of_tensorrt(facts.identity.soc, tensorrt)
    if fault:
        compare = f"compare answers with --device cpu, or install a later JetPack ({fault.source})"
        return Check("tensorrt", "warn", f"{found}; {fault.what}", compare)
    return Check("tensorrt", "ok", found)


def _container(facts: DeviceFacts) -> Check | None:
    if facts.gpu_nodes or not (facts.identity.container or facts.root == "/"):
        return Check("container", "ok", "with access to the GPU") if facts.identity.container else None
    if not facts.identity.container:
        return Check("gpu access", "fail", "no GPU device under /dev", advice.load_driver(facts))
    start = "start it with: docker run --runtime nvidia -e NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics"
    return Check("container", "fail", "no GPU device in this container", start)


def _free_blocks(facts: DeviceFacts) -> Check:
    blocks = facts.memory.free_blocks
    if blocks is None:
        return Check("free blocks", "unknown", facts.unknown.get("memory.free_blocks", ""), "sudo cat /proc/buddyinfo")
    size, total = format_size(blocks.block_bytes), format_size(blocks.total_bytes)
    found = f"{blocks.count} blocks of {size} are the largest that are free, {total} together"
    if blocks.total_bytes < _BIG_ALLOCATION_BYTES:
        reason = "memory is in pieces: big allocations fail with NvMap error 12 while plenty is free"
        return Check("free blocks", "warn", found, f"{reason}; {_FREE_BLOCKS_ADVICE}")
    return Check("free blocks", "ok", found)


def _page_cache(facts: DeviceFacts) -> Check | None:
    memory = facts.memory
    if memory.total_bytes is None or memory.free_bytes is None or memory.available_bytes is None:
        return None  # told by the line on memory
    free, available = format_size(memory.free_bytes), format_size(memory.available_bytes)
    found = f"{free} free, {available} with the page cache given back"
    if memory.free_bytes < memory.total_bytes // 10 and memory.available_bytes > 2 * memory.free_bytes:
        cure = f"CUDA reports only the first figure; this program counts the second. {_FREE_BLOCKS_ADVICE}"
        return Check("page cache", "warn", found, cure)
    return Check("page cache", "ok", found)


def _jetson_stats(facts: DeviceFacts) -> Check:
    if facts.telemetry == "jetson-stats":
        return Check("jetson-stats", "ok", "installed; readings are from it")
    if facts.software.jetson_stats and facts.root == "/":
        found = f"installed, but does not answer; readings are from {facts.telemetry}"
        return Check("jetson-stats", "warn", found, "sudo systemctl restart jtop.service")
    if facts.software.jetson_stats:
        return Check("jetson-stats", "ok", f"installed; readings are from {facts.telemetry}")
    optional = f"optional; for the memory clock without root: {advice.install_jetson_stats(facts)}"
    return Check("jetson-stats", "warn", f"not installed; readings are from {facts.telemetry}", optional)


def _gpu(facts: DeviceFacts) -> Check:
    if facts.gpus:
        names = ", ".join(f"{gpu.name} ({gpu.sm or 'sm unknown'})" for gpu in facts.gpus)
        if facts.gpu_nodes or (facts.root != "/" and not facts.identity.container):
            return Check("gpu", "ok", names)
        cure = "in a container: docker run --gpus all; otherwise: sudo nvidia-modprobe -u -c 0"
        return Check("gpu", "warn", f"{names}, without a device under /dev", cure)
    if facts.software.nvidia_driver:
        found = f"driver {facts.software.nvidia_driver}, but no GPU is listed"
        return Check("gpu", "warn", found, "nvidia-smi tells why")
    return Check("gpu", "ok", "none: everything runs on the CPU")


def _python(facts: DeviceFacts) -> Check:
    found = facts.software.python
    if found is None:
        return Check("python", "unknown", facts.unknown.get("software.python", ""), "sudo apt install python3")
    if any(found == known or found.startswith(f"{known}.") for known in PYTHONS):
        return Check("python", "ok", found)
    return Check("python", "fail", found, f"avl-edge runs on Python {PYTHONS[0]} to {PYTHONS[-1]}: make one's venv")


def _compiler(facts: DeviceFacts) -> Check:
    if facts.software.compiler:
        return Check("compiler", "ok", facts.software.compiler)
    cure = "the native kernels are built at install: sudo apt install g++, then install again; without, torch is used"
    return Check("compiler", "warn", "no C++ compiler", cure)


def _memory(facts: DeviceFacts) -> Check:
    memory = facts.memory
    if memory.total_bytes is None or memory.usable_bytes is None:
        reason = facts.unknown.get("memory.total_bytes") or facts.unknown.get("memory.available_bytes", "")
        return Check("memory", "unknown", reason, "give budgets by hand: --kv-budget")
    limit = memory.cgroup.limit_bytes if memory.cgroup else None
    whole = memory.total_bytes if limit is None else min(memory.total_bytes, limit)
    found = f"{format_size(memory.usable_bytes)} of {format_size(whole)} can be used"
    if memory.usable_bytes < whole // 5:
        return Check("memory", "warn", found, "end other programs, or choose a smaller model or budget")
    return Check("memory", "ok", found)


def _pressure(facts: DeviceFacts) -> Check | None:
    pressure = facts.memory.pressure
    if pressure is None:
        return None  # many kernels are built without it
    found = f"tasks waited for memory {pressure.some_avg10_percent:g} % of the last 10 s"
    if pressure.some_avg10_percent < 10:
        return Check("memory pressure", "ok", found)
    return Check("memory pressure", "warn", found, "another program takes the memory: find it with top, key M")


def _cgroup(facts: DeviceFacts) -> Check | None:
    group = facts.memory.cgroup
    if group is None or group.limit_bytes is None or group.room_bytes is None:
        return None
    found = f"limit {format_size(group.limit_bytes)}, room for {format_size(group.room_bytes)}"
    total = facts.memory.total_bytes
    if total is not None and group.limit_bytes >= total:
        return Check("control group", "ok", found)
    if group.room_bytes < group.limit_bytes // 5:
        return Check("control group", "warn", found, "raise it: docker run --memory, or systemd's MemoryMax")
    return Check("control group", "ok", f"{found}; this program counts it as the machine's memory")


def _swap(facts: DeviceFacts) -> Check | None:
    used = sum(swap.used_bytes for swap in facts.memory.swaps)
    zram = sum(swap.used_bytes for swap in facts.memory.swaps if swap.zram)
    size = sum(swap.size_bytes for swap in facts.memory.swaps)
    if "memory.swaps" in facts.unknown:
        return None
    if zram > 64 << 20:
        return Check("swap", "warn", f"{format_size(zram)} in zram", advice.leave_zram(facts))
    if size and used > size // 2:
        return Check("swap", "warn", f"{format_size(used)} of {format_size(size)} used", "end other programs")
    return Check("swap", "ok", f"{format_size(used)} of {format_size(size)} used" if size else "none")


def _temperature(facts: DeviceFacts) -> Check | None:
    thermal = facts.thermal
    cooling = advice.cool_down(facts)
    if thermal.throttling:
        return Check("temperature", "warn", f"slowed down now: {', '.join(thermal.throttling)}", cooling)
    if not thermal.temperatures:
        reason = facts.unknown.get("thermal.temperatures", "")
        return Check("temperature", "unknown", reason, "ls /sys/class/thermal") if facts.is_jetson else None
    hot = [zone for zone in thermal.temperatures if zone.limit_celsius and zone.celsius >= zone.limit_celsius - 3]
    if hot:
        places = ", ".join(f"{zone.name} {zone.celsius:.0f} C (limit {zone.limit_celsius:.0f} C)" for zone in hot)
        return Check("temperature", "warn", places, cooling)
    warmest = max(thermal.temperatures, key=lambda zone: zone.celsius)
    return Check("temperature", "ok", f"{warmest.name} {warmest.celsius:.0f} C is the warmest")
