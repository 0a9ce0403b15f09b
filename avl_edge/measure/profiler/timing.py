"""Times that hold for an undisturbed machine, and the process's memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch


def undisturbed(times: Sequence[float]) -> float:
    """The mean over the faster half: moments in which others used the machine drop out."""
    fast = sorted(times)[: max(1, (len(times) + 1) // 2)]
    return sum(fast) / len(fast)


def cycle_means(times: Sequence[float], cycle: int) -> list[float]:
    """The mean step of each whole cycle of ``cycle`` steps, which differ by design; of all, where they are fewer."""
    cycle = min(cycle, len(times))
    return [sum(times[i : i + cycle]) / cycle for i in range(0, len(times) - cycle + 1, cycle)]


def per_step(times: Sequence[float], cycle: int) -> float:
    """:func:`undisturbed` over whole cycles of ``cycle`` steps."""
    return undisturbed(cycle_means(times, cycle))


def repeat(function: Callable[[], object], seconds: float = 0.2, least: int = 5) -> tuple[float, int]:
    """(:func:`undisturbed` milliseconds of a call, calls) over ``seconds`` and ``least`` calls, after a first one."""
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        times.append(timed(function))
    return undisturbed(times), len(times)


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = now()
    function()
    return 1000 * (now() - start)


def now() -> float:
    """Seconds of a clock. With one thread it is the processor's, which stands still while others run."""
    return time.thread_time() if clock() == "processor" else time.perf_counter()


def clock() -> str:
    """Whose time is measured, as profiles say it: ``processor`` or ``wall``."""
    return "processor" if torch.get_num_threads() == 1 else "wall"


def forget_peak() -> None:
    """Give freed memory back to the system and let :func:`peak_bytes` count from what is resident now."""
    with suppress(AttributeError):  # another C library: what was freed may count once more, peaks are never too low
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most resident memory of this process since :func:`forget_peak`."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """The resident memory of this process now."""
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
