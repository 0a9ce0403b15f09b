"""Beside a process that really takes memory and gives it back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from avl_edge import Formats, Runtime
from avl_edge.machine import allocator
from tests.conftest import Checkpoints
from tests.equipment.machines import GB, write
from tests.equipment.short_memory import AVL, ask, check, formats_of

_GREEDY = """
import sys
from pathlib import Path

group, taken = Path(sys.argv[1]), []
for line in sys.stdin:
    if line.startswith("take"):
        taken.append(bytearray(b"x") * (32 * 2**20))
    else:
        taken.clear()
    resident = int(open("/proc/self/statm").read().split()[1]) * 4096
    (group / "memory.current").write_text(f"{resident}\\n")
    print(resident, flush=True)
"""


class Greedy:
    """A process that really takes memory, in a control group of ``limit`` bytes that holds nobody else."""

    def __init__(self, root: Path, limit: int) -> None:
        group = root / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (root / "proc/self").mkdir()
        (root / "proc/self/cgroup").write_text("0::/\n")
        (group / "memory.max").write_text(f"{limit}\n")
        command = [sys.executable, "-c", _GREEDY, str(group)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.tell("free")

    def tell(self, word: str) -> int:
        """``take`` 32 MiB, or ``free`` all; how much it has then."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path, 6 * GB)
    return tmp_path


@pytest.fixture
def greedy(tree: Path) -> Iterator[Greedy]:
    process = Greedy(tree, 200 * 2**20)
    yield process
    process.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_another_process_takes_memory_and_gives_it_back(
    checkpoint: Checkpoints, tree: Path, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime.load(checkpoint("mistral-gqa"), threaded=False)
    monkeypatch.setattr(allocator, "resident_bytes", lambda: 0)  # this process is not in the group
    runtime.keep_free(64 * 2**20, root=tree, every_ms=0)
    generation = ask(runtime, AVL)
    next(generation)
    assert formats_of(generation) == Formats()
    while greedy.tell("take") < (200 - 64) * 2**20:
        next(generation)
        assert formats_of(generation) == Formats()
    next(generation)
    assert formats_of(generation).secondary == "int8"
    next(generation)
    assert formats_of(generation).secondary == "int4"
    for _ in range(5):
        next(generation)
    assert runtime.debug.scheduler.is_held
    waiting = ask(runtime, AVL)
    next(generation)
    assert waiting.cache is None
    check(runtime, generation)
    greedy.tell("free")
    assert waiting.result().kv.pressure.demotions == 0
    assert waiting.result().kv.pressure.waited_ms > 0
    assert generation.result().kv.pressure.rows_evicted == 5 * 22
