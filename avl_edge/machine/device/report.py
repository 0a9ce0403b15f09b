"""Facts and checks as text for people, and as a dict for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...config import format_size
from .doctor import Check, exit_code
from .facts import DeviceFacts, Gpu, Rail

_MARKS = {"ok": "ok", "warn": "warn", "fail": "FAIL", "unknown": "?"}


def report(facts: DeviceFacts, checks: Sequence[Check]) -> str:
    """A table of the facts, then the checklist with what to do about each line that is not ok."""
    rows = [(name, value) for name, value in _rows(facts) if value]
    width = max(len(name) for name, _ in (*rows, *((check.name, "") for check in checks)))
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines.append("")
    for check in checks:
        lines.append(f"[{_MARKS[check.status]:^4}] {check.name:<{width}}  {check.found}")
        if check.advice:
            lines.append(f"       {'':<{width}}  -> {check.advice}")
    return "\n".join(lines) + "\n"


def to_dict(facts: DeviceFacts, checks: Sequence[Check]) -> dict[str, Any]:
    """``{"ok": ..., "facts": {...}, "checks": [...]}``; every value is one that JSON knows."""
    return {
        "ok": exit_code(checks) == 0,
        "facts": facts.to_dict(),
        "checks": [check.to_dict() for check in checks],
    }


def _rows(facts: DeviceFacts) -> list[tuple[str, str]]:
    identity, software, power = facts.identity, facts.software, facts.power
    mode = f"{power.mode_name or 'unknown'} (id {power.mode_id})" if power.mode_id is not None else ""
    return [
        ("machine", _join(identity.model, identity.module_id, identity.soc, identity.architecture)),
        ("system", _join(identity.system, identity.kernel, "in a container" if identity.container else None)),
        ("jetpack", _join(software.jetpack, software.l4t and f"L4T {software.l4t}")),
        ("cuda", _join(software.cuda, _named("TensorRT", software.tensorrt), _named("driver", software.nvidia_driver))),
        ("power mode", mode),
        ("cpu", _cpu(facts)),
        *(("gpu", _gpu(gpu)) for gpu in facts.gpus),
        ("memory", _memory(facts)),
        ("bandwidth", _bandwidth(facts)),
        ("temperatures", ", ".join(f"{zone.name} {zone.celsius:.1f} C" for zone in facts.thermal.temperatures)),
        ("rails", _rails(facts)),
    ]


def _join(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _named(name: str, value: str | None) -> str | None:
    return f"{name} {value}" if value else None


def _mhz(clock: int | None, what: str) -> str | None:
    return f"{what} {clock / 1e6:g} MHz" if clock else None


def _cpu(facts: DeviceFacts) -> str:
    cpu = facts.cpu
    nodes = f"{len(cpu.numa)} memory nodes" if len(cpu.numa) > 1 else None
    cores = f"{cpu.cores} cores" if cpu.cores else None
    online = f"{cpu.logical} online" if cpu.logical else None
    return _join(cpu.name, cores, online, _mhz(cpu.max_hz, "at most"), nodes)


def _gpu(gpu: Gpu) -> str:
    memory = format_size(gpu.memory_bytes) if gpu.memory_bytes else "shares main memory" if gpu.integrated else None
    load = f"load {gpu.load_percent:g} %" if gpu.load_percent is not None else None
    return _join(gpu.name, gpu.sm, memory, _mhz(gpu.cur_hz, "now at"), _mhz(gpu.max_hz, "at most"), load)


def _memory(facts: DeviceFacts) -> str:
    memory = facts.memory
    sizes = (("", memory.total_bytes), ("available ", memory.available_bytes), ("usable ", memory.usable_bytes))
    return _join(*(f"{name}{format_size(size)}" for name, size in sizes if size is not None))


def _bandwidth(facts: DeviceFacts) -> str:
    memory = facts.memory
    if memory.bandwidth_bytes_per_s is None:
        return ""
    how = facts.derived.get("memory.bandwidth_bytes_per_s", "")
    return f"{memory.bandwidth_bytes_per_s / 1e9:.1f} GB/s, derived: {how}"


def _rails(facts: DeviceFacts) -> str:
    power = facts.power
    whole = power.whole_board
    rails = ", ".join(f"{rail.name} {rail.power_mw} mW{_offset(rail)}" for rail in power.rails)
    together = f"{power.rails_sum_mw} mW together (derived), less than the board draws"
    total = f"{whole.name} is the whole board" if whole else together
    return f"{rails}; {total}" if rails else ""


def _offset(rail: Rail) -> str:
    return " (the sensor's offset: it draws next to nothing)" if rail.power_mw < 0 else ""
