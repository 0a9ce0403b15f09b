"""Clients in several threads, sessions, cancels, drops, failures, pressure, interrupts and closes in any order."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from avl_edge import AvlEdgeError, Generation, ImageSession, Options, Runtime
from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.kv.layout import page_bytes
from avl_edge.kv.shared_prefix import SharedPrefixCache
from tests.conftest import Checkpoints
from tests.equipment.broken_backend import STAGES
from tests.equipment.image_sessions import IMAGES, WHOLE
from tests.equipment.machines import GB, write
from tests.equipment.slow_backend import LIMIT

OPTIONS = [
    Options(max_new_tokens=6),
    Options("avl", {**WHOLE, "text_keep": 50, "text_floor": 4}, max_new_tokens=9, temperature=1.0),
    Options("coarse", {"core": 20}, max_new_tokens=12),
]
CLIENTS = 3
numbers = st.integers(0, 99)


class Faults:
    """What goes wrong next, in a backend of which this takes the place."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.waiting: list[tuple[str, type[BaseException]]] = []
        for name in ("begin_prefill", "decode"):
            patch.setattr(TorchBackend, name, self._failing(name, getattr(TorchBackend, name)))

    def _failing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def fails(*arguments: Any, **named: Any) -> Any:
            stage = name if name == "decode" else "prompt"
            if stage == "prompt" and isinstance(arguments[3], SharedPrefixCache):
                stage = "prefix"
            if self.waiting and self.waiting[0][0] == stage:
                raise self.waiting.pop(0)[1]("broken")
            return function(*arguments, **named)

        return fails


class Client(threading.Thread):
    """A thread that does what it is given, one after the other; ``problems``: what came out that should not."""

    def __init__(self, problems: list[BaseException]) -> None:
        super().__init__(daemon=True)
        self.work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._problems = problems
        self.start()

    def run(self) -> None:
        while (work := self.work.get()) is not None:
            try:
                work()
            except AvlEdgeError:
                pass
            except BaseException as error:
                self._problems.append(error)
            del work


class EngineLife(RuleBasedStateMachine):
    """After every step the pool's books are in order, each lease holds what was planned at most, and nobody holds rows
    but those whom the scheduler knows; in the end everybody has had an end, and nothing is left."""

    directory: Path
    tree: Path

    @initialize(pages=st.integers(12, 60))
    def load(self, pages: int) -> None:
        self.pages, self.patch = pages, pytest.MonkeyPatch()
        self.faults = Faults(self.patch)
        self.problems: list[BaseException] = []
        self.clients = [Client(self.problems) for _ in range(CLIENTS)]
        self.asked: list[Generation] = []
        self.sessions: list[ImageSession] = []
        self._open()

    def _open(self) -> None:
        write(self.tree, 6 * GB)
        self.runtime = Runtime.open(self.directory)
        self.runtime.keep_free(GB, root=self.tree, every_ms=0)
        self.runtime.load_weights(pool_bytes=self.pages * page_bytes(self.runtime.kv_shape))

    def _do(self, client: int, work: Callable[[], None]) -> None:
        self.clients[client % CLIENTS].work.put(work)

    @rule(
        client=numbers,
        picture=st.sampled_from([(), (0,), (1,)]),
        options=st.sampled_from(OPTIONS),
        priority=st.integers(-1, 2),
        deadline=st.sampled_from([None, None, None, 0.02, 30.0]),
    )
    def ask(self, client: int, picture: tuple[int, ...], options: Options, priority: int, deadline: Any) -> None:
        runtime, asked = self.runtime, self.asked

        def work() -> None:
            request = runtime.prepare([IMAGES[at] for at in picture], "What is shown?", options)
            asked.append(runtime.submit(request, priority=priority, deadline=deadline))

        self._do(client, work)

    @rule(picture=st.sampled_from([0, 1]))
    def open_session(self, picture: int) -> None:
        self.sessions.append(self.runtime.open_images(IMAGES[picture : picture + 1], OPTIONS[0]))

    @rule(client=numbers, choice=numbers, options=st.sampled_from([None, OPTIONS[2]]))
    def ask_about(self, client: int, choice: int, options: Options | None) -> None:
        asked = self.asked
        if self.sessions:
            session = self.sessions[choice % len(self.sessions)]
            self._do(client, lambda: asked.append(session.ask("How many boats?", options)))

    @rule(choice=numbers, drop=st.booleans())
    def close_session(self, choice: int, drop: bool) -> None:
        if self.sessions:
            session = self.sessions.pop(choice % len(self.sessions))
            if not drop:
                self._do(choice, session.close)

    @rule(client=numbers, choice=numbers, count=st.integers(1, 8))
    def take(self, client: int, choice: int, count: int) -> None:
        asked = self.asked

        def work() -> None:
            if asked:
                for _ in zip(range(count), asked[choice % len(asked)], strict=False):
                    pass

        self._do(client, work)

    @rule(choice=numbers, how=st.sampled_from(["cancel", "drop", "drop in a circle", "close"]))
    def end(self, choice: int, how: str) -> None:
        with suppress(IndexError, ZeroDivisionError):
            generation = self.asked.pop(choice % len(self.asked))
            if how == "cancel":
                generation.handle.cancel()
            elif how == "close":
                self._do(choice, generation.close)
            elif how == "drop in a circle":
                circle: list[object] = [generation]
                circle.append(circle)
                del generation, circle
                gc.collect(0)

    @rule(stage=st.sampled_from(STAGES), kind=st.sampled_from([ValueError, KeyboardInterrupt]))
    def fail(self, stage: str, kind: type[BaseException]) -> None:
        self.faults.waiting = [(stage, kind)]

    @rule()
    def interrupt(self) -> None:
        for thread in threading.enumerate():
            if thread.name == "avl-edge engine":
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
                )

    @rule(short=st.booleans())
    def memory(self, short: bool) -> None:
        write(self.tree, GB // 2 if short else 6 * GB)

    @rule(drain=st.booleans(), really=st.integers(0, 4))
    def close(self, drain: bool, really: int) -> None:
        if really == 0:
            write(self.tree, 6 * GB)
            self.runtime.close(drain=drain)
            self.sessions.clear()
            self._open()

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "runtime"):
            assert self.problems == []
            self._call(self._check)

    def _call(self, function: Callable[[], None]) -> None:
        while True:
            try:
                return self.runtime.engine.call(function)
            except KeyboardInterrupt:  # that fell on this very call
                pass

    def _check(self) -> None:
        debug = self.runtime.debug
        running, prefixes = debug.scheduler.running, debug.scheduler.prefixes
        pairs = [(each.cache, each.request.plan) for each in running]
        pairs += [(each.cache, each.plan) for each in prefixes if each.cache]
        debug.pool.check_integrity([cache.rows for cache, _ in pairs if cache])
        for cache, plan in pairs:
            assert cache is not None
            assert cache.rows.lease.held <= cache.rows.lease.limit <= plan.pages
        assert debug.pool.bytes_in_use == sum(cache.rows.lease.nbytes for cache, _ in pairs if cache)

    def teardown(self) -> None:
        if not hasattr(self, "runtime"):
            return
        write(self.tree, 6 * GB)
        self.faults.waiting.clear()
        for session in self.sessions:
            session.close()
        for client in self.clients:
            client.work.put(None)
            client.join(LIMIT)
            assert not client.is_alive()
        for generation in self.asked:
            with suppress(AvlEdgeError):
                generation.result(LIMIT)
            assert generation.finish_reason
        self.sound()
        assert self.runtime.kv_bytes_in_use == 0
        self.runtime.close()
        self.patch.undo()


@contextmanager
def _limits(seconds: float) -> Iterator[None]:
    logging.getLogger("avl_edge").setLevel(logging.CRITICAL)
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        logging.getLogger("avl_edge").setLevel(logging.NOTSET)


def _run(checkpoint: Checkpoints, tree: Path, examples: int, steps: int) -> None:
    EngineLife.directory, EngineLife.tree = checkpoint("mistral-gqa"), tree
    machine = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(EngineLife, settings=machine)


def test_any_order(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with _limits(10 * LIMIT):
        _run(checkpoint, tmp_path, 12, 30)


@pytest.mark.long
@pytest.mark.parametrize("interval", [5e-3, 1e-6], ids=["as usual", "switching at any moment"])
def test_any_order_of_ten_thousand_steps(checkpoint: Checkpoints, tmp_path: Path, interval: float) -> None:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        with _limits(60 * LIMIT):
            _run(checkpoint, tmp_path, 100, 100)
    finally:
        sys.setswitchinterval(usual)


def test_any_order_while_threads_switch_at_any_moment(checkpoint: Checkpoints, tmp_path: Path) -> None:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with _limits(10 * LIMIT):
            _run(checkpoint, tmp_path, 4, 30)
    finally:
        sys.setswitchinterval(usual)
