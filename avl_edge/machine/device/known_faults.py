"""Versions that give wrong results on a chip, by public reports: one table, with its sources."""

from __future__ import annotations

from dataclasses import dataclass

from .nvidia_text import version_key


@dataclass(frozen=True)
class Fault:
    """TensorRT from ``first`` up to, but not with, ``fixed`` on the chip ``soc``: ``what`` goes wrong, by the word of
    ``source``."""

    soc: str
    first: str
    fixed: str
    what: str
    source: str


FAULTS = (
    Fault(
        soc="tegra264",
        first="10.13.3.9",
        fixed="10.13.3.10",
        what="several report wrong results where matrices that share an input are fused (q/k/v, gate/up) at batch 1",
        source="github.com/NVIDIA/TensorRT-Edge-LLM issues 105 and 151; not seen on JetPack 7.2",
    ),
)


def fault_of_tensorrt(soc: str | None, version: str) -> Fault | None:
    """What is known against this version on this chip."""
    found = version_key(version)
    for fault in FAULTS:
        if soc == fault.soc and version_key(fault.first) <= found < version_key(fault.fixed):
            return fault
    return None
