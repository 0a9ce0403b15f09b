"""Programs that are asked on a live machine, each with a time limit; in a recorded tree, what they printed.

A recorded tree may hold the output of these programs in ``/commands/NAME``; nothing is run for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Timer
from typing import Any

from .facts import Rail, Temperature
from .tree import Reading, Tree
from .values import celsius, hertz_of_khz, integer, is_constant, line_of

MAX_OUTPUT = 1 << 20

# In a process of its own: the library starts threads and waits for its service, which may not answer.
_ASK_JTOP = """
import json
from jtop import jtop
with jtop(interval=0.5) as board:
    if board.ok():
        names = ("temperature", "power", "memory")
        print(json.dumps({name: dict(getattr(board, name)) for name in names}, default=str))
"""


@dataclass(frozen=True)
class Program:
    """How to ask: the command, whether its first line is the answer, and the time limit in seconds."""

    command: tuple[str, ...]
    one_line: bool = False
    seconds: float = 5.0


PROGRAMS = {
    "tegrastats": Program(("tegrastats", "--interval", "200"), one_line=True),
    "nvpmodel": Program(("nvpmodel", "-q")),
    "nvidia-smi": Program(
        ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"),
        seconds=10.0,
    ),
    "jtop": Program((sys.executable, "-c", _ASK_JTOP)),
}


@dataclass(frozen=True)
class JtopSample:
    """What jetson-stats tells of the moment; ``emc_hz`` is the memory clock, which only root could read."""

    temperatures: tuple[Temperature, ...]
    rails: tuple[Rail, ...]
    emc_hz: int | None


def ask(tree: Tree, name: str) -> Reading:
    """What the program ``name`` of :data:`PROGRAMS` prints, or printed when the tree was recorded."""
    if not tree.live:
        return tree.read(f"/commands/{name}")
    program = PROGRAMS[name]
    if name == "jtop" and not has_jtop(tree):
        return Reading(None, "jetson-stats is not installed")
    path = shutil.which(program.command[0], path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/sbin")
    if path is None:
        return Reading(None, f"there is no program {name}")
    return run((path, *program.command[1:]), program.seconds, program.one_line)


def has_jtop(tree: Tree) -> bool:
    """Is jetson-stats installed: importable here, or among the packages of a recorded tree?"""
    if not tree.live:
        return bool(tree.glob("/usr/local/lib/python3*/dist-packages/jtop"))
    try:
        return importlib.util.find_spec("jtop") is not None
    except (ImportError, ValueError):
        return False


def run(command: Sequence[str], seconds: float, one_line: bool = False) -> Reading:
    """What ``command`` prints, or its first line; a program that takes longer than ``seconds`` is ended."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        return Reading(None, f"cannot be run: {error.strerror}")
    timer = Timer(seconds, _end, [process])
    timer.daemon = True
    timer.start()
    assert process.stdout is not None
    with process.stdout as pipe:
        output = pipe.readline(MAX_OUTPUT) if one_line else pipe.read(MAX_OUTPUT)
    timer.cancel()
    if one_line or len(output) == MAX_OUTPUT:
        _end(process)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:  # it closed its output and goes on
        _end(process)
        code = process.wait()
    if not output:
        return Reading(None, f"printed nothing within {seconds:g} s (exit status {code})")
    if code and not one_line:
        return Reading(None, f"ended with exit status {code}")
    return Reading(output.decode("utf-8", "replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, which hold the same pipe. Only before it is waited for: its id is its own."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def parse_jtop(text: str) -> JtopSample | None:
    """The JSON that :data:`PROGRAMS` has jetson-stats print; None if it tells neither temperatures nor rails."""
    try:
        sample = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(sample, dict):
        return None
    temperatures = tuple(
        Temperature(name, value)
        for name, zone in _items(sample.get("temperature"))
        if (value := celsius(str(zone.get("temp") if isinstance(zone, dict) else zone))) is not None
        and not is_constant(name)
    )
    rails = _rails(sample.get("power"))
    return JtopSample(temperatures, rails, _emc(sample.get("memory"))) if temperatures or rails else None


def _items(value: Any) -> list[tuple[str, Any]]:
    """The entries of what should be an object, with a name fit to print."""
    entries = value.items() if isinstance(value, dict) else ()
    return [(name, entry) for key, entry in entries if (name := line_of(str(key)))]


def _rails(power: Any) -> tuple[Rail, ...]:
    """The rail of the whole board stands beside the others, as the total, and has a name then; a total without one is
    a sum."""
    if not isinstance(power, dict):
        return ()
    total = power.get("tot")
    named = [(str(total["name"]), total)] if isinstance(total, dict) and "name" in total else []
    listed = dict([*_items(dict(named)), *_items(power.get("rail"))])
    return tuple(rail for name, values in listed.items() if isinstance(values, dict) and (rail := _rail(name, values)))


def _rail(name: str, values: dict[str, Any]) -> Rail | None:
    power, voltage, current = (integer(str(values.get(key)), -(10**6), 10**6) for key in ("power", "volt", "curr"))
    return None if power is None else Rail(name, power, voltage, current)


def _emc(memory: Any) -> int | None:
    emc = memory.get("EMC") if isinstance(memory, dict) else None
    return hertz_of_khz(str(emc.get("cur"))) if isinstance(emc, dict) else None
