"""The profile that a command plans with: a named device's, a file's, or this machine's."""

from __future__ import annotations

from pathlib import Path

from ..machine import device, profile
from ..machine.profile import BadProfile, DeviceProfile

OWN_PROFILES = Path("profiles") / "measured"
"""Where profiles of this machine are written and looked for: a folder beside the work."""


def open_profile(name: str | None, power: str | None) -> DeviceProfile:
    """A named device's profile, a file's, or (None) this machine's own, with the memory that it has now."""
    if name is None:
        facts = device.probe()
        found = profile.for_machine(facts, profile.own(OWN_PROFILES))
        _require_mode(found, power)
        return profile.with_memory(found, facts)
    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        found = profile.read(name)
        _require_mode(found, power)
        return found
    return profile.named(name, power)


def _require_mode(found: DeviceProfile, power: str | None) -> None:
    mode = found.power_mode
    if power is not None and (mode is None or profile.short(mode.name) != profile.short(power)):
        raise BadProfile(
            f"the profile {found.name} is not of power mode {power}: name a device to plan for another mode"
        )
