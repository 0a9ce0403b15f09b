"""A line of tegrastats, in all the forms that JetPack 5 to 7 print. A pure function of text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .facts import FreeBlocks, Rail, Temperature
from .values import MAX_BYTES, celsius, hertz, integer, is_constant

_UNITS = {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}
_RAM = re.compile(r"\bRAM\s+([0-9]{1,9})/([0-9]{1,9})(kB|MB|GB)\b", re.IGNORECASE)
_LFB = re.compile(r"\blfb\s+([0-9]{1,9})x([0-9]{1,6})(kB|MB|GB)\b", re.IGNORECASE)
_SWAP = re.compile(r"\bSWAP\s+([0-9]{1,9})/([0-9]{1,9})(kB|MB|GB)\b", re.IGNORECASE)
_CPU = re.compile(r"\bCPU\s+\[([^\]]{0,4096})\](?:@([0-9]{1,6}))?")
_CORE = re.compile(r"([0-9]{1,3})%(?:@([0-9]{1,6}))?")
_ENGINE = r"\b{name}(?:_FREQ)?\s+(?:([0-9]{{1,3}})%)?\s?(?:@(?:\[([^\]]{{0,256}})\]|([0-9]{{1,6}})))?"
_EMC = re.compile(_ENGINE.format(name="EMC"))
_GR3D = re.compile(_ENGINE.format(name="GR3D"))
_ZONE = re.compile(r"\b([A-Za-z][A-Za-z0-9_-]{0,31})@(-?[0-9]{1,4}(?:\.[0-9]{1,6})?)C\b")
# JetPack 4 wrote rails without "mW"; Orin's boards write it. One value is the present one; an average may follow, and
# a peak. A sensor's offset makes a rail that draws next to nothing negative.
_RAIL = re.compile(
    r"\b([A-Z][A-Z0-9_]{1,31})\s+(?:(-?[0-9]{1,6})mW(?:/-?[0-9]{1,6}(?:mW)?){0,2}"
    r"|(-?[0-9]{1,6})(?:/-?[0-9]{1,6}(?:mW)?){1,2})(?![0-9A-Za-z/])"
)
_NOT_RAILS = ("RAM", "SWAP", "IRAM", "NC")  # NC: a channel of the sensor that is not connected


@dataclass(frozen=True)
class CpuLoad:
    """One CPU that is switched on: its load at its clock."""

    percent: int | None
    hz: int | None


@dataclass(frozen=True)
class TegraStats:
    """What one line tells; None or empty for what it does not. A CPU that is off is None in ``cpus``, and so is in
    ``gpu_hz`` a part of the GPU that is off or asleep."""

    ram_used_bytes: int | None
    ram_total_bytes: int | None
    free_blocks: FreeBlocks | None
    swap_used_bytes: int | None
    swap_total_bytes: int | None
    cpus: tuple[CpuLoad | None, ...]
    emc_percent: int | None
    emc_hz: int | None
    gpu_percent: int | None
    gpu_hz: tuple[int | None, ...]
    temperatures: tuple[Temperature, ...]
    rails: tuple[Rail, ...]


def parse_tegrastats(text: str) -> TegraStats | None:
    """The last line of ``text`` that is one of tegrastats (it always tells the RAM), or None."""
    lines = [line for line in text.splitlines() if _RAM.search(line)]
    if not lines:
        return None
    line = lines[-1][:20_000]
    ram_used, ram_total = _pair(_RAM, line)
    swap_used, swap_total = _pair(_SWAP, line)
    emc_percent, emc_hz = _engine(_EMC, line)
    gpu_percent, gpu_hz = _engine(_GR3D, line)
    return TegraStats(
        ram_used_bytes=ram_used,
        ram_total_bytes=ram_total,
        free_blocks=_free_blocks(line),
        swap_used_bytes=swap_used,
        swap_total_bytes=swap_total,
        cpus=_cpus(line),
        emc_percent=emc_percent,
        emc_hz=emc_hz[0] if emc_hz else None,
        gpu_percent=gpu_percent,
        gpu_hz=gpu_hz,
        temperatures=_temperatures(line),
        rails=_rails(line),
    )


def _pair(pattern: re.Pattern[str], line: str) -> tuple[int | None, int | None]:
    """(used, total) in bytes."""
    match = pattern.search(line)
    if match is None or int(match[1]) > int(match[2]):
        return None, None
    unit = _UNITS[match[3].lower()]
    return int(match[1]) * unit, int(match[2]) * unit


def _free_blocks(line: str) -> FreeBlocks | None:
    match = _LFB.search(line)
    blocks = FreeBlocks(int(match[1]), int(match[2]) * _UNITS[match[3].lower()]) if match else None
    return blocks if blocks and blocks.total_bytes <= MAX_BYTES else None


def _cpus(line: str) -> tuple[CpuLoad | None, ...]:
    match = _CPU.search(line)
    if match is None:
        return ()
    cores = [_CORE.fullmatch(word.strip()) for word in match[1].split(",")]
    shared = match[2]  # `CPU [1%,2%]@1500`: one clock for all
    return tuple(core and CpuLoad(_percent(core[1]), _hz(core[2] or shared)) for core in cores)


def _hz(mhz: str | None) -> int | None:
    """None for what is no clock, such as the 0 of an engine that sleeps."""
    return hertz(f"{mhz}000000") if mhz else None


def _percent(text: str | None) -> int | None:
    return integer(text, 0, 100)


def _engine(pattern: re.Pattern[str], line: str) -> tuple[int | None, tuple[int | None, ...]]:
    """(load in percent, clocks in Hz) of ``NAME_FREQ 14%@[407,off]`` and its shorter forms, each clock in its place."""
    match = pattern.search(line)
    if match is None:
        return None, ()
    if match[2] is None and match[3] is None:
        return _percent(match[1]), ()
    words = (match[3] or match[2]).split(",")
    return _percent(match[1]), tuple(_hz(word.strip()) if word.strip().isdecimal() else None for word in words)


def _temperatures(line: str) -> tuple[Temperature, ...]:
    found = ((match[1], celsius(match[2])) for match in _ZONE.finditer(line))
    return tuple(Temperature(name, value) for name, value in found if value is not None and not is_constant(name))


def _rails(line: str) -> tuple[Rail, ...]:
    """The rails' present power; what follows it, an average since the program's start, is left out."""
    found = _RAIL.finditer(line)
    return tuple(Rail(match[1], int(match[2] or match[3])) for match in found if match[1] not in _NOT_RAILS)
