"""The profile that a command plans with: a named device's, a file's, or this machine's."""

from __future__ import annotations

import os
from pathlib import Path

from ..machine import device, profile
from ..machine.device import DeviceFacts
from ..machine.profile import BadProfile, DeviceProfile

OWN_PROFILES = Path("profiles") / "measured"
"""Where profiles of this machine are written: a folder beside the work."""
_USER_PROFILES = Path(os.path.expanduser("~/.local/share/avl-edge/profiles"))
_SYSTEM_PROFILES = Path("/var/lib/avl-edge/profiles/measured")
"""Where the unit avl-edge-profile@.service writes them."""


def search_path() -> tuple[Path, ...]:
    """The folders in which this machine's profile is looked for, the first that has one first; then come those that are
    shipped."""
    return OWN_PROFILES, _USER_PROFILES, _SYSTEM_PROFILES


def of_machine(facts: DeviceFacts) -> DeviceProfile:
    """The profile of the search path that holds for this machine as it is; :class:`BadProfile` where none does."""
    return profile.for_machine(facts, [found for _, found in profile.own(*search_path())])


def open_profile(name: str | None, power: str | None) -> DeviceProfile:
    """A named device's profile, a file's, or (None) this machine's own, with the memory that it has now."""
    if name is None:
        facts = device.probe()
        found = of_machine(facts)
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
