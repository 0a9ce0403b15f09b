"""Sixteen clients at once, with random cancels, drops and failures: nothing is left, and memory stays where it was."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from avl_edge import AvlEdgeError, Options, Runtime
from avl_edge.errors import StepFailed
from avl_edge.kv.cache import SequenceCache
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.short_memory import PROMPT
from tests.equipment.slow_backend import LIMIT

CLIENTS = 16
PICTURES = [random_image(seed, (60, 60)) for seed in range(6)]
GROWTH = 16 * 2**20
"""Bytes of resident memory within which it counts as flat: the allocator's, which keeps what it was given back."""


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Clients:
    """Half of them threads, half coroutines of one event loop, until ``end``; ``problems``: what should not happen."""

    def __init__(self, runtime: Runtime, end: float) -> None:
        self.runtime, self.end = runtime, end
        self.problems: list[BaseException] = []
        self.answers = 0

    def run(self) -> None:
        threads = [threading.Thread(target=self._thread, args=(number,)) for number in range(CLIENTS // 2)]
        threads.append(threading.Thread(target=lambda: asyncio.run(self._coroutines())))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3 * LIMIT)
            assert not thread.is_alive()

    def _request(self, chance: random.Random) -> Any:
        method = chance.choice([None, "avl", "h2o"])
        options = Options(method, max_new_tokens=chance.randint(1, 24), temperature=chance.choice([0, 1.0]))
        pictures = chance.sample(PICTURES, chance.choice([0, 1, 1, 2]))
        return self.runtime.prepare(pictures, PROMPT, options)

    def _thread(self, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.end:
            try:
                self._ask(chance)
            except (StepFailed, TimeoutError):
                pass
            except BaseException as error:
                self.problems.append(error)
                return

    def _ask(self, chance: random.Random) -> None:
        generation = self.runtime.submit(self._request(chance), priority=chance.randint(-1, 1))
        what = chance.choice(["result", "result", "iterate", "close", "drop", "give up"])
        if what == "result":
            generation.result()
        elif what == "give up":
            generation.result(timeout=0.005)
        for _ in zip(range(chance.randint(1, 30)), generation if what != "drop" else (), strict=False):
            pass
        if what == "close":
            generation.close()
        self.answers += generation.finish_reason is not None

    async def _coroutines(self) -> None:
        await asyncio.gather(*(self._coroutine(number) for number in range(CLIENTS // 2, CLIENTS)))

    async def _coroutine(self, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.end:
            handle = self.runtime.submit(self._request(chance)).handle
            try:
                if chance.random() < 0.3:
                    await asyncio.wait_for(handle, 0.01)
                left = chance.randint(1, 30)
                async for _ in handle:
                    left -= 1
                    if not left:
                        break
                self.answers += 1
            except (AvlEdgeError, asyncio.TimeoutError):
                pass


def _soak(checkpoint: Checkpoints, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    faulthandler.dump_traceback_later(seconds + 5 * LIMIT, exit=True)
    runtime, chance = Runtime.load(checkpoint("mistral-gqa")), random.Random(0)
    settle = SequenceCache.settle

    def fails_at_times(*arguments: Any) -> Any:
        if chance.random() < 0.001:
            raise ValueError("broken")
        return settle(*arguments)

    monkeypatch.setattr(SequenceCache, "settle", fails_at_times)
    resident = []
    for part in (1, 1, 2):
        clients = Clients(runtime, time.monotonic() + part * seconds / 4)
        clients.run()
        assert clients.problems == []
        assert clients.answers > 0
        gc.collect()
        runtime.engine.call(lambda: runtime.debug.pool.check_integrity([]))
        assert runtime.kv_bytes_in_use == 0
        assert runtime.debug.pool.pages_unreserved == runtime.debug.pool.pages
        assert runtime.debug.scheduler.requests == ()
        resident.append((_resident(), len(os.listdir("/proc/self/fd")), threading.active_count()))
    (before, files, threads), (after, *left) = resident[1:]
    assert left == [files, threads]
    assert after - before <= GROWTH
    runtime.close()
    faulthandler.cancel_dump_traceback_later()


def test_sixteen_clients(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    _soak(checkpoint, 5, monkeypatch)


@pytest.mark.long
def test_sixteen_clients_for_a_minute(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    _soak(checkpoint, 60, monkeypatch)
