"""What a Jetson writes about itself: release, device tree, power modes. Pure functions of text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .facts import PowerMode
from .values import hertz, hertz_of_khz, integer, line_of

_RELEASE = re.compile(r"R([0-9]{1,3})\s*\(release\),\s*REVISION:\s*([0-9]{1,3}(?:\.[0-9]{1,3}){0,2})", re.IGNORECASE)
_NUMBER = re.compile(r"(nvidia,|\+)(p[0-9]{4})(-[0-9]{4})(?:-[a-z]+)?", re.IGNORECASE)
_SOC = re.compile(r"nvidia,(tegra[0-9]{2,4})", re.IGNORECASE)
_MODE = re.compile(r"<\s*POWER_MODEL\b([^<>]*)>", re.IGNORECASE)
_DEFAULT = re.compile(r"<\s*PM_CONFIG\s+DEFAULT=([0-9]{1,4})\s*>", re.IGNORECASE)
_QUERY = re.compile(r"NV Power Mode:[ \t]*(\S[^\r\n]{0,63})", re.IGNORECASE)
_MOST_NOISE = 20
_STATUS = re.compile(r"\bpmode:([0-9]{1,4})\b", re.IGNORECASE)

# The release file knows no JetPack version, so where the package is missing it has to be looked up.
_JETPACK_OF_L4T = {
    "32.6.1": "4.6",
    "32.7.1": "4.6.1",
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "39.2.0": "7.2",
}

_JETPACK_OF_SERIES = {"32": "4.x", "35": "5.x", "36": "6.x", "38": "7.x", "39": "7.x"}

# Numbers of modules. Boards and whole kits have such numbers too (p2972: the kit of an AGX Xavier), and stand alike.
_MODULES = {
    "p2180": "TX1",
    "p3310": "TX2",
    "p3489": "TX2i, TX2 4 GB",
    "p3636": "TX2 NX",
    "p3448": "Nano",
    "p2888": "AGX Xavier",
    "p3668": "Xavier NX",
    "p3701": "AGX Orin",
    "p3767": "Orin NX, Orin Nano",
    "p3834": "AGX Thor",
}

# What the chip cannot be asked without running CUDA on it, by its device-tree name and its chip id.
_SM_OF_SOC = {"tegra234": "sm_87"}
_SOC_OF_CHIP_ID = {0x18: "tegra186", 0x19: "tegra194", 0x21: "tegra210", 0x23: "tegra234", 0x26: "tegra264"}


@dataclass(frozen=True)
class MemoryBus:
    """Width in bits, and the fastest memory clock in Hz where the module has only one."""

    bits: int
    max_hz: int | None


def parse_release(text: str) -> str | None:
    """The L4T version such as ``36.4.3`` of an ``/etc/nv_tegra_release``."""
    match = _RELEASE.search(text)
    return f"{match[1]}.{match[2]}" if match else None


def parse_model(text: str) -> str | None:
    """The NUL-terminated name of ``/proc/device-tree/model``."""
    return line_of(text)


def parse_module_id(text: str) -> str | None:
    """The module such as ``p3701-0005`` of a device tree's ``compatible``.

    It has an entry of its own, or stands behind the carrier board's: ``nvidia,p3737-0000+p3701-0005``. A number that is
    not known for a module's is none, unless it stands in that place.
    """
    own = [match for entry in text.split("\0") if (match := _NUMBER.fullmatch(entry.strip()))]
    behind = [match for match in _NUMBER.finditer(text) if match[1] == "+"]
    found = [match for match in own if match[2].lower() in _MODULES] or behind
    return (found[0][2] + found[0][3]).lower() if found else None


def parse_soc(text: str) -> str | None:
    """The chip such as ``tegra234`` of a device tree's ``compatible``."""
    match = _SOC.search(text)
    return match[1].lower() if match else None


def parse_chip_id(text: str) -> str | None:
    """The chip of ``/sys/devices/soc0/soc_id``, which a container sees where it does not see the device tree."""
    chip = integer(text, 0, 0xFF)
    return None if chip is None else _SOC_OF_CHIP_ID.get(chip)


def jetpack_of_l4t(l4t: str) -> str | None:
    """The JetPack release, or those, that are known to carry this L4T version; None for one that is not known."""
    if l4t.startswith("38."):
        return "7.0 or 7.1"
    return _JETPACK_OF_L4T.get(l4t)


def jetpack_series(l4t: str) -> str | None:
    """Such as ``6.x``: what a release of this series belongs to, whether or not it is one that is known."""
    return _JETPACK_OF_SERIES.get(l4t.split(".", maxsplit=1)[0])


def sm_of_soc(soc: str) -> str | None:
    """The CUDA architecture of a chip's GPU."""
    return _SM_OF_SOC.get(soc)


def memory_bus(module_id: str) -> MemoryBus | None:
    """The memory bus of a module (data sheets): no file of the device tells its width."""
    if module_id.startswith("p3701-"):  # AGX Orin
        return MemoryBus(256, 3_199_000_000)
    if module_id == "p3767-0004":  # Orin Nano 4 GB
        return MemoryBus(64, None)
    if module_id.startswith("p3767-"):  # Orin NX, Orin Nano 8 GB
        return MemoryBus(128, None)
    return None


def parse_mode_id(text: str) -> int | None:
    """The mode id of ``/var/lib/nvpmodel/status`` (``pmode:0002``)."""
    match = _STATUS.search(text)
    return int(match[1]) if match else None


def parse_mode_query(text: str) -> tuple[int, str] | None:
    """(id, name) of what ``nvpmodel -q`` prints; warnings may stand between the two."""
    match = _QUERY.search(text)
    lines = text[match.end() :].splitlines()[:_MOST_NOISE] if match else ()
    mode_id = next((found for line in lines if (found := integer(line, 0, 9999)) is not None), None)
    return (mode_id, match[1].strip()) if match and mode_id is not None else None


def parse_default_mode(text: str) -> int | None:
    """The id of the mode that nvpmodel.conf names as the default."""
    match = _DEFAULT.search(text)
    return int(match[1]) if match else None


def parse_power_modes(text: str) -> tuple[PowerMode, ...] | None:
    """The modes of an nvpmodel.conf, in the order of the file; None if there is none."""
    modes: dict[int, PowerMode] = {}
    heads = list(_MODE.finditer(text))
    for head, following in zip(heads, [*heads[1:], None], strict=False):
        given = {key.upper(): value for key, _, value in (word.partition("=") for word in head[1].split())}
        mode_id, name = integer(given.get("ID"), 0, 9999), given.get("NAME", "")
        if mode_id is not None and name and name.isprintable() and len(name) <= 64:
            body = text[head.end() : following.start() if following else None]
            modes.setdefault(mode_id, _mode(mode_id, name, body.split("<", 1)[0]))
    return tuple(modes.values()) or None


def _mode(mode_id: int, name: str, body: str) -> PowerMode:
    """A mode from its settings, lines such as ``CPU_ONLINE CORE_0 1`` and ``GPU MAX_FREQ 612000000``."""
    settings = [words for line in body.splitlines() if len(words := line.split("#", 1)[0].split()) == 3]
    cores = [value for kind, _, value in settings if kind.upper() == "CPU_ONLINE"]
    caps = {kind.upper(): value for kind, key, value in settings if key.upper() == "MAX_FREQ"}
    cpu_caps = [clock for kind, value in caps.items() if kind.startswith("CPU") and (clock := hertz_of_khz(value))]
    return PowerMode(
        id=mode_id,
        name=name,
        cpus=sum(value == "1" for value in cores) if cores else None,
        cpu_max_hz=max(cpu_caps, default=None),
        gpu_max_hz=hertz(caps.get("GPU")),  # -1 and 0 mean "no cap", and are no clocks
        emc_max_hz=hertz(caps.get("EMC")),
    )
