"""Jetson's own readings: power mode, memory clock, rails, temperatures."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .facts import Identity, Power, Rail, Temperature, Thermal
from .finder import Finder
from .jetson_text import memory_bus, parse_default_mode, parse_mode_id, parse_mode_query, parse_power_modes
from .live import parse_jtop
from .tegrastats import parse_tegrastats
from .values import celsius, celsius_of_milli, hertz, integer, is_constant, line_of

# Both places that kernels have given the cap that the power mode sets.
_EMC_CAPS = ("/sys/kernel/nvpmodel_clk_cap/emc", "/sys/kernel/nvpmodel_emc_cap/emc_iso_cap")
_INA238 = "/sys/bus/i2c/drivers/ina238/*/hwmon/hwmon*"
_EMC_MAX = "/sys/kernel/debug/bpmp/debug/clk/emc/max_rate"
_MAX_SENSORS = 64
_ZONE_ENDING = re.compile(r"[-_ ](?:thermal|therm|tegra)(?:[-_]zone)?$")


@dataclass(frozen=True)
class Telemetry:
    """Readings of the moment and who gave them; empty ones are left to sysfs."""

    source: str = "sysfs"
    temperatures: tuple[Temperature, ...] = ()
    rails: tuple[Rail, ...] = ()
    emc_hz: int | None = None


def find_telemetry(find: Finder) -> Telemetry:
    """jetson-stats where it is installed and answers, else tegrastats, else nothing."""
    jtop = find.quietly("jtop", parse_jtop)
    if jtop:
        return Telemetry("jetson-stats", jtop.temperatures, jtop.rails, jtop.emc_hz)
    stats = find.quietly("tegrastats", parse_tegrastats)
    if stats:
        return Telemetry("tegrastats", stats.temperatures, stats.rails, stats.emc_hz)
    return Telemetry()


def find_power(find: Finder, jetson: bool, telemetry: Telemetry) -> Power:
    """The power mode in force, the modes there are, and the rails."""
    if not jetson:
        return Power()
    modes = find.first("power.modes", ("/etc/nvpmodel.conf", parse_power_modes)) or ()
    queried = None
    mode_id = find.quietly("/var/lib/nvpmodel/status", parse_mode_id)
    if mode_id is None:
        queried = find.first(
            "power.mode_id",
            ("nvpmodel", parse_mode_query),
            ("/etc/nvpmodel.conf", lambda text: _default_mode(find, text)),
        )
        mode_id = queried[0] if queried else None
    names = {mode.id: mode.name for mode in modes}
    name = (queried[1] if queried else "") or names.get(mode_id if mode_id is not None else -1)
    if name is None:
        find.unknown["power.mode_name"] = f"/etc/nvpmodel.conf has no mode {mode_id}"
    return Power(mode_id, name, modes, telemetry.rails or _sysfs_rails(find))


def _default_mode(find: Finder, text: str) -> tuple[int, str] | None:
    """A machine whose mode was never set runs in the default one."""
    default = parse_default_mode(text)
    if default is None:
        return None
    find.derived["power.mode_id"] = "the default of /etc/nvpmodel.conf, because nothing tells the mode in force"
    return default, ""


def _sysfs_rails(find: Finder) -> tuple[Rail, ...]:
    """The channels of the ina3221 sensors that have a label: millivolts times milliamperes; and Thor's ina238."""
    found = [rail for folder in find.tree.glob(_INA238) if (rail := _ina238(find, folder))]
    for folder in find.tree.glob("/sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*"):
        for channel in (1, 2, 3):
            label = find.quietly(f"{folder}/in{channel}_label", line_of)
            voltage = find.quietly(f"{folder}/in{channel}_input", lambda text: integer(text, 0, 100_000))
            current = find.quietly(f"{folder}/curr{channel}_input", lambda text: integer(text, -100_000, 100_000))
            if label and label != "NC" and voltage is not None and current is not None:
                found.append(Rail(label, round(voltage * current / 1000), voltage, current))
    if found:
        find.derived["power.rails"] = "power_mw is voltage_mv x current_ma / 1000"
    else:
        find.unknown["power.rails"] = "no ina3221 sensor has labelled channels, and no telemetry tells rails"
    return tuple(found)


def _ina238(find: Finder, folder: str) -> Rail | None:
    """A sensor of one channel that multiplies itself: microwatts."""
    label = next(
        (name for each in ("power1", "in1") if (name := find.quietly(f"{folder}/{each}_label", line_of))), None
    )
    power = find.quietly(f"{folder}/power1_input", lambda text: integer(text, 0, 10**9))
    return None if label is None or power is None else Rail(label, round(power / 1000))


def find_emc_cap(find: Finder) -> int | None:
    """The fastest memory clock that the power mode allows, in Hz; 0 in the file means "no cap"."""
    cap = find.first("memory.emc_cap_hz", *((path, lambda text: integer(text, 0, 20 * 10**9)) for path in _EMC_CAPS))
    if cap == 0:
        find.unknown["memory.emc_cap_hz"] = "the power mode sets no cap"
        return None
    if cap is not None and hertz(str(cap)) is None:
        find.unknown["memory.emc_cap_hz"] = f"{cap} Hz is no memory clock"
        return None
    return cap


def find_bandwidth(find: Finder, identity: Identity, cap_hz: int | None) -> int | None:
    """Bytes per second on paper: two transfers per clock over the module's bus."""
    bus = memory_bus(identity.module_id) if identity.module_id else None
    clock = cap_hz or find.quietly(_EMC_MAX, hertz) or (bus.max_hz if bus else None)
    if bus is None or clock is None:
        lacking = "the module's bus width" if bus is None else "the memory clock"
        find.unknown["memory.bandwidth_bytes_per_s"] = f"{lacking} is not known"
        return None
    source = "cap of the power mode" if cap_hz else "the fastest clock"
    find.derived["memory.bandwidth_bytes_per_s"] = (
        f"{clock / 1e6:g} MHz ({source}) x 2 transfers x {bus.bits} bit / 8: on paper, not measured"
    )
    return clock * 2 * bus.bits // 8


def find_thermal(find: Finder, telemetry: Telemetry) -> Thermal:
    """The kernel's thermal zones with their limits, refreshed by the telemetry's values, and the active alerts."""
    zones = {_zone_key(zone.name): zone for zone in _zones(find)}
    for reading in telemetry.temperatures:
        known = zones.get(_zone_key(reading.name))
        zones[_zone_key(reading.name)] = Temperature(
            known.name if known else reading.name, reading.celsius, known.limit_celsius if known else None
        )
    if not zones:
        find.unknown["thermal.temperatures"] = "no thermal zone can be read"
    return Thermal(tuple(zones.values()), _alerts(find))


def _zone_key(name: str) -> str:
    """sysfs says ``cpu-thermal``, and on older modules ``CPU-therm``, where tegrastats says ``CPU`` or ``cpu``."""
    return _ZONE_ENDING.sub("", name.lower())


def _zones(find: Finder) -> list[Temperature]:
    found = []
    for folder in find.tree.glob("/sys/class/thermal/thermal_zone*")[:_MAX_SENSORS]:
        name = find.quietly(f"{folder}/type", line_of)
        value = find.quietly(f"{folder}/temp", celsius_of_milli)
        if name and value is not None and not is_constant(name):
            found.append(Temperature(name, value, _limit(find, folder)))
    return found


def _limit(find: Finder, folder: str) -> float | None:
    """The lowest trip point at which the kernel slows the machine down; "active" ones only turn a fan."""
    limits = []
    for index in range(12):
        kind = find.quietly(f"{folder}/trip_point_{index}_type", line_of)
        value = find.quietly(f"{folder}/trip_point_{index}_temp", celsius_of_milli)
        if kind in ("passive", "hot", "critical") and value is not None and celsius(str(value)) and value > 40:
            limits.append(value)
    return min(limits, default=None)


def _alerts(find: Finder) -> tuple[str, ...]:
    """The names of Jetson's throttle alerts that are on."""
    found = []
    for folder in find.tree.glob("/sys/class/thermal/cooling_device*")[: 4 * _MAX_SENSORS]:
        name = find.quietly(f"{folder}/type", line_of)
        if name and name.endswith("-alert"):
            state = find.quietly(f"{folder}/cur_state", lambda text: integer(text, 0, 1000))
            found += [name] if state else []
    return tuple(found)
