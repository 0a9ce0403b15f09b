"""What to do, in words that hold on the system that was found."""

from __future__ import annotations

import re

from .facts import DeviceFacts

# Ubuntu's first release whose pip installs nothing beside the system's packages, and Debian's.
_EXTERNALLY_MANAGED = {"Ubuntu": (23, 4), "Debian": (12, 0)}
_SYSTEM = re.compile(r"(Ubuntu|Debian)[^0-9]{0,40}([0-9]{1,3})(?:\.([0-9]{1,2}))?")
# Modules that never got a JetPack with a TensorRT that is new enough.
_LAST_JETPACK = {"tegra210": "4.6", "tegra186": "4.6", "tegra194": "5.1"}


def install_jetson_stats(facts: DeviceFacts) -> str:
    """The command that installs it for the whole system."""
    options = "--break-system-packages " if _is_externally_managed(facts.identity.system or "") else ""
    return f"sudo pip3 install {options}-U jetson-stats"


def _is_externally_managed(system: str) -> bool:
    match = _SYSTEM.search(system)
    return match is not None and (int(match[2]), int(match[3] or 0)) >= _EXTERNALLY_MANAGED[match[1]]


def newer_tensorrt(facts: DeviceFacts, oldest: str) -> str:
    """How to come by one of ``oldest`` or later."""
    last = _LAST_JETPACK.get(facts.identity.soc or "")
    if last:
        return f"TensorRT {oldest} or later is needed, and JetPack {last} is this module's last: models run on its CPU"
    if not facts.is_jetson:
        return f"TensorRT {oldest} or later is needed: pip install tensorrt"
    return f"TensorRT {oldest} or later is needed: install JetPack 6.1 or later"


def missing_tensorrt(facts: DeviceFacts, oldest: str) -> str:
    """How to come by one at all."""
    return newer_tensorrt(facts, oldest) if facts.identity.soc in _LAST_JETPACK else "sudo apt install nvidia-jetpack"


def load_driver(facts: DeviceFacts) -> str:
    """Of the GPU: Thor's is NVIDIA's common one."""
    return f"load the driver: sudo modprobe {'nvidia' if facts.identity.soc == 'tegra264' else 'nvgpu'}"


def leave_zram(facts: DeviceFacts) -> str:
    """How to swap to a disk instead."""
    off = "sudo systemctl disable nvzramconfig" if facts.is_jetson else "sudo swapoff /dev/zram0"
    return f"zram keeps them in the same memory: {off}, and swap to {'NVMe' if facts.is_jetson else 'a disk'}"


def cool_down(facts: DeviceFacts) -> str:
    """What lowers a temperature."""
    if facts.is_jetson:
        return "clean or speed up the fan (sudo jetson_clocks --fan), or choose a lower power mode"
    return "clean or speed up the fan, or give the machine less to do"
