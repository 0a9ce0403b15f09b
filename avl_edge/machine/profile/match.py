"""Which profile is for which machine, and what a new measurement does to an old profile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..device import DeviceFacts
from .files import shipped
from .schema import BadProfile, Device, DeviceProfile, Figure, PowerMode

_DEFAULT_MODES = ("MODE_30W", "MAXN")


def device_of(facts: DeviceFacts) -> Device:
    """The machine of ``facts`` as a profile names it."""
    identity, cpu = facts.identity, facts.cpu
    architecture = identity.architecture or "unknown"
    name = identity.module_id or cpu.name or identity.model or "machine"
    name = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    if facts.is_jetson:
        return Device(name, "jetson", architecture, (identity.module_id,) if identity.module_id else ())
    return Device(f"{name}-{cpu.logical or 0}", "linux", architecture, (), cpu.name, cpu.logical)


def mode_of(facts: DeviceFacts) -> PowerMode | None:
    """The power mode in force, for machines that have one."""
    power = facts.power
    return None if power.mode_id is None else PowerMode(power.mode_id, power.mode_name or str(power.mode_id))


def name_of(facts: DeviceFacts) -> str:
    """What this machine's profile is called."""
    mode = mode_of(facts)
    return "-".join([device_of(facts).name, *([short(mode.name)] if mode else [])])


def mismatch(profile: DeviceProfile, device: Device, mode: PowerMode | None) -> str | None:
    """Why ``profile`` does not hold for this machine in this mode, in words; None where it does."""
    mine = profile.device
    if mine.kind != device.kind:
        return f"the profile is for {mine.name} ({mine.kind}), this machine is {device.name} ({device.kind})"
    if mine.kind == "jetson":
        # A Jetson that does not tell its module is known by its name.
        same = set(mine.modules) & set(device.modules) if mine.modules else mine == device
        if not same:
            modules = f" ({', '.join(mine.modules)})" if mine.modules else ""
            return f"the profile is for {mine.name}{modules}, this machine is {device.name}"
        if profile.power_mode and (mode is None or short(mode.name) != short(profile.power_mode.name)):
            present = mode.name if mode else "an unknown one"
            return f"the profile is for power mode {profile.power_mode.name}, this machine is in {present}"
        return None
    other = f"the profile is for {mine.name}, this machine is {device.name}"
    if mine.architecture != device.architecture:
        return f"{other} ({mine.architecture} and {device.architecture})"
    measured = mine.cpu is not None or mine.logical_cpus is not None
    return other if measured and (mine.cpu, mine.logical_cpus) != (device.cpu, device.logical_cpus) else None


def require_match(profile: DeviceProfile, facts: DeviceFacts, flag: str) -> None:
    """Raise :class:`BadProfile` when ``profile`` is another machine's; ``flag`` is the option that overrides."""
    reason = mismatch(profile, device_of(facts), mode_of(facts))
    if reason:
        raise BadProfile(f"{reason}: profile this machine in a file of its own, or give {flag}")


def short(mode: str) -> str:
    """A power mode's name as people write it: ``30w`` for ``MODE_30W``."""
    return mode.strip().lower().removeprefix("mode_")


def for_machine(facts: DeviceFacts, own: Iterable[DeviceProfile] = ()) -> DeviceProfile:
    """The first profile that holds for this machine, measured ones of ``own`` before those that are shipped."""
    device, mode = device_of(facts), mode_of(facts)
    for profile in (*own, *shipped().values()):
        if mismatch(profile, device, mode) is None:
            return profile
    raise BadProfile(
        f"no profile is for this machine ({device.name}, {device.architecture}"
        f"{f', power mode {mode.name}' if mode else ''}): run `avl-edge profile`, or name one with --device"
    )


def named(name: str, power: str | None) -> DeviceProfile:
    """The shipped profile of a device (or of its own name) in power mode ``power``; None: its default mode."""
    known = shipped()
    wanted = name.strip().lower()
    found = [each for each in known.values() if wanted == each.device.name]
    if not found and wanted in known:
        found = [known[wanted]]
    if not found:
        devices = dict.fromkeys(each.device.name for each in known.values())
        raise BadProfile(f"there is no device {name!r}: give one of {', '.join(devices)}, or a profile's file")
    modes = {short(each.power_mode.name): each for each in found if each.power_mode}
    if power is None:
        default = [modes[short(each)] for each in _DEFAULT_MODES if short(each) in modes]
        return (default or found)[0]
    if short(power) not in modes:
        offer = f"it has {', '.join(modes)}" if modes else "it has no power modes"
        raise BadProfile(f"{name} has no power mode {power!r}: {offer}")
    return modes[short(power)]


def with_memory(profile: DeviceProfile, facts: DeviceFacts) -> DeviceProfile:
    """``profile`` with the memory that this machine has now, where it tells."""
    memory = facts.memory
    if memory.total_bytes is None or memory.usable_bytes is None:
        return profile
    total = Figure(memory.total_bytes, "measured", "MemTotal")
    available = Figure(memory.usable_bytes, "measured", "the lesser of MemAvailable and the control group's room")
    reserve = Figure(reserve_bytes(memory.usable_bytes), "derived", "a tenth of what is available (choice)")
    return replace(
        profile,
        memory=replace(profile.memory, total_bytes=total, available_bytes=available, reserve_bytes=reserve),
    )


def reserve_bytes(available: int) -> int:
    """What stays untouched for other processes."""
    return available // 10


def merged(old: DeviceProfile, new: DeviceProfile) -> DeviceProfile:
    """``old`` with all that ``new`` measured; what it did not measure stays, samples of a model by label."""
    models = dict(old.models)
    for name, record in new.models.items():
        before = models.get(name)
        if before:
            labels = {(sample.phase, sample.label) for sample in record.samples}
            kept = [each for each in before.samples if (each.phase, each.label) not in labels]
            record = replace(record, budgets=record.budgets or before.budgets, samples=(*kept, *record.samples))
        models[name] = record
    return replace(new, name=old.name, models=models)
