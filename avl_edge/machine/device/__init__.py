"""What machine is this: ``probe(root)`` gives the facts, ``diagnose(facts)`` what to do about them."""

from __future__ import annotations

from .doctor import Check, diagnose, exit_code
from .facts import (
    Cgroup,
    Cpu,
    DeviceFacts,
    FreeBlocks,
    Gpu,
    Identity,
    Memory,
    NumaNode,
    Power,
    PowerMode,
    Pressure,
    Rail,
    Software,
    Swap,
    Temperature,
    Thermal,
)
from .probe import probe, read_machine, read_memory, read_power, read_shortage, read_thermal
from .report import report, to_dict

__all__ = [
    "Cgroup",
    "Check",
    "Cpu",
    "DeviceFacts",
    "FreeBlocks",
    "Gpu",
    "Identity",
    "Memory",
    "NumaNode",
    "Power",
    "PowerMode",
    "Pressure",
    "Rail",
    "Software",
    "Swap",
    "Temperature",
    "Thermal",
    "diagnose",
    "exit_code",
    "probe",
    "read_machine",
    "read_memory",
    "read_power",
    "read_shortage",
    "read_thermal",
    "report",
    "to_dict",
]
