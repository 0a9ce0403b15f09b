"""What any Linux kernel and package manager write: memory, CPUs, control groups, packages. Pure functions of text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .facts import FreeBlocks, Pressure, Swap
from .values import MAX_BYTES, MAX_CPUS, bytes_of_kib, decimal, integer, line_of

_MEMINFO = re.compile(r"^(?:Node\s+[0-9]+\s+)?([A-Za-z_()0-9]{1,40}):\s+([0-9]{1,20})\s+kB\s*$", re.MULTILINE)
_PSI = re.compile(
    r"^(some|full)\s+avg10=([0-9.]{1,12})\s+avg60=([0-9.]{1,12})\s+avg300=([0-9.]{1,12})\s+total=([0-9]{1,20})\s*$",
    re.MULTILINE,
)
_SWAP = re.compile(r"^(\S{1,200})\s+(?:partition|file)\s+([0-9]{1,20})\s+([0-9]{1,20})\b", re.MULTILINE)
_BUDDY = re.compile(r"^Node\s+[0-9]+,\s+zone\s+\S+((?:\s+[0-9]{1,12})+)\s*$", re.MULTILINE)
_ARM_PART = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x4E, 0x004): "Carmel",
}


@dataclass(frozen=True)
class MemInfo:
    """Sizes in bytes; None for those that the kernel does not tell."""

    total_bytes: int | None
    free_bytes: int | None
    available_bytes: int | None
    cached_bytes: int | None


@dataclass(frozen=True)
class CpuInfo:
    """``cores`` counts physical ones; where the kernel tells no topology, each logical CPU is one."""

    name: str | None
    architecture: str | None
    logical: int
    cores: int


def parse_meminfo(text: str) -> MemInfo | None:
    """``/proc/meminfo``, or a NUMA node's ``meminfo``; None if it does not tell the total."""
    sizes = {match[1]: bytes_of_kib(match[2]) for match in _MEMINFO.finditer(text)}
    if not sizes.get("MemTotal"):
        return None
    total, parts = sizes["MemTotal"], [sizes.get(name) for name in ("Cached", "Buffers", "SReclaimable")]
    cached = sum(size or 0 for size in parts) if any(size is not None for size in parts) else None
    free, available, cached = (
        size if size is None or size <= (total or 0) else None  # more than there is: not to be believed
        for size in (sizes.get("MemFree"), sizes.get("MemAvailable"), cached)
    )
    return MemInfo(total, free, available, cached)


def parse_swaps(text: str) -> tuple[Swap, ...] | None:
    """``/proc/swaps``; an empty tuple where there is no swap, None if this is not that file."""
    if not text.lstrip().startswith("Filename"):
        return None
    found = ((match[1], bytes_of_kib(match[2]), bytes_of_kib(match[3])) for match in _SWAP.finditer(text))
    return tuple(Swap(name, size, used) for name, size, used in found if size is not None and used is not None)


def parse_pressure(text: str) -> Pressure | None:
    """``/proc/pressure/memory`` or a control group's ``memory.pressure``; ``total`` is in microseconds."""
    lines: dict[str, tuple[float, float, float, int]] = {}
    for match in _PSI.finditer(text):
        tens, sixties, hundreds = (decimal(match[index], 0, 100) for index in (2, 3, 4))
        total = integer(match[5], 0, MAX_BYTES)
        if tens is not None and sixties is not None and hundreds is not None and total is not None:
            lines[match[1]] = (tens, sixties, hundreds, total)
    if "some" not in lines:
        return None
    return Pressure(*lines["some"], *lines["full"]) if "full" in lines else Pressure(*lines["some"])


def parse_buddyinfo(text: str, page_bytes: int = 4096) -> FreeBlocks | None:
    """The largest free blocks of ``/proc/buddyinfo``: column n of a zone counts blocks of 2^n pages."""
    counts: dict[int, int] = {}
    for match in _BUDDY.finditer(text):
        for order, count in enumerate(match[1].split()[:20]):
            counts[order] = counts.get(order, 0) + int(count)
    if not counts:
        return None
    largest = max((order for order, count in counts.items() if count), default=0)
    blocks = FreeBlocks(counts[largest], page_bytes << largest)
    return blocks if blocks.total_bytes <= MAX_BYTES else None


def parse_cpuinfo(text: str) -> CpuInfo | None:
    """``/proc/cpuinfo`` of x86 or arm64; None if it lists no processor."""
    processors = [cpu for block in text.split("\n\n") if "processor" in (cpu := dict(_fields(block)))]
    if not processors:
        return None
    first, count = processors[0], len(processors)
    places = {(cpu["physical id"], cpu["core id"]) for cpu in processors if "physical id" in cpu and "core id" in cpu}
    arm = "CPU implementer" in first
    architecture = "aarch64" if arm else "x86_64" if "vendor_id" in first else None
    name = _arm_name(first) if arm else line_of(first.get("model name", ""))
    return CpuInfo(name, architecture, count, len(places) or count)


def _fields(block: str) -> Iterator[tuple[str, str]]:
    for line in block.splitlines():
        key, colon, value = line.partition(":")
        if colon and not line[0].isspace():  # an indented line continues the text of the one above
            yield key.strip(), value.strip()


def _arm_name(cpu: dict[str, str]) -> str | None:
    """Arm cores give numbers, not names; the kernel's "model name" says only which revision."""
    try:
        implementer, part = int(cpu["CPU implementer"][:8], 16), int(cpu["CPU part"][:8], 16)
    except (KeyError, ValueError):
        return line_of(cpu.get("model name", ""))
    return _ARM_PART.get((implementer, part), f"Arm implementer {implementer:#04x} part {part:#05x}")


def parse_cpu_list(text: str) -> tuple[int, ...] | None:
    """CPU ids of a list such as ``0-3,8``; None if it is not one, or absurd."""
    found: set[int] = set()
    for word in text.strip(" \t\r\n\0").split(","):
        low, dash, high = word.partition("-")
        first = integer(low, 0, MAX_CPUS)
        last = integer(high, 0, MAX_CPUS) if dash else first
        if first is None or last is None or last < first:
            return None
        found.update(range(first, last + 1))
    return tuple(sorted(found)) or None


def parse_own_cgroups(text: str) -> dict[int, str] | None:
    """``/proc/self/cgroup``: the memory group's path by version, 1 and/or 2 (both in a hybrid hierarchy)."""
    found: dict[int, str] = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and path.startswith("/") and path.isprintable() and len(path) <= 4096:
            if "memory" in controllers.split(","):
                found[1] = path
            elif number == "0" and not controllers:
                found[2] = path
    return found or None


def parse_limit(text: str) -> tuple[int | None] | None:
    """A control group's limit as (bytes,), or (None,) for no limit: "max", or version 1's number near 2^63."""
    word = text.strip(" \t\r\n\0")
    if word == "max" or (integer(word, MAX_BYTES, 1 << 64)) is not None:
        return (None,)
    limit = integer(word, 0, MAX_BYTES)
    return None if limit is None else (limit,)


def parse_byte_count(text: str) -> int | None:
    """A file that holds one number of bytes."""
    return integer(text, 0, MAX_BYTES)


def parse_reclaimable(text: str) -> int | None:
    """Bytes of page cache, not lately used, of a control group's ``memory.stat`` (either version)."""
    values = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) == 2)
    return integer(values.get("total_inactive_file", values.get("inactive_file")), 0, MAX_BYTES)


def parse_packages(text: str) -> dict[str, str] | None:
    """Version by name of the installed packages of a dpkg ``status`` file; None if it lists none."""
    found: dict[str, str] = {}
    for stanza in text.replace("\r", "").split("\n\n"):
        fields = dict(_fields(stanza))
        name, version = line_of(fields.get("Package", "")), line_of(fields.get("Version", ""))
        if name and version and fields.get("Status", "").split()[-1:] == ["installed"]:
            found[name] = version
    return found or None


def parse_os_release(text: str) -> str | None:
    """The system's name for people, of ``/etc/os-release``."""
    match = re.search(r"^PRETTY_NAME=\"?([^\"\n]{1,200})\"?\s*$", text, re.MULTILINE)
    return line_of(match[1]) if match else None
