"""The engine's thread: nothing blocks it or waits for it that should not, and it ends when it is told to."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from avl_edge import BadInput, Options, Runtime
from avl_edge.errors import EngineClosed
from tests import ROOT
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.machines import GB, write
from tests.equipment.short_memory import watchful
from tests.equipment.slow_backend import LIMIT, stopped

IMAGE, PROMPT = random_image(3, (120, 80)), "Describe the picture in detail."
SHORT, LONG = Options(max_new_tokens=6), Options(max_new_tokens=200)


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    faulthandler.dump_traceback_later(3 * LIMIT, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Iterator[Runtime]:
    with Runtime.load(checkpoint("mistral-gqa")) as runtime:
        yield runtime


def _until_refused(runtime: Runtime) -> None:
    while True:
        runtime.generate([], PROMPT, SHORT).handle.cancel()
        time.sleep(0.01)


def engine_threads() -> int:
    return sum(thread.name == "avl-edge engine" for thread in threading.enumerate())


def test_finalizers_do_not_wait_for_a_step(runtime: Runtime) -> None:
    """Nor for anything else: the engine stands still until they are through."""
    session = runtime.open_images([IMAGE])
    session.load()
    with stopped(runtime) as stop:
        generations = [runtime.generate([IMAGE], PROMPT, LONG) for _ in range(2)]
        assert stop.reached.wait(LIMIT)
        next(generations[0])
        del session
        generations.clear()
        gc.collect()
    assert runtime.kv_bytes_in_use == 0


def test_a_finalizer_in_a_logging_handler_does_not_wait_for_who_logs(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """One thread is in a handler, under its lock, when the collector runs there; the engine waits for that lock, to say
    that memory is short."""
    write(tmp_path, 6 * GB)
    runtime = watchful(checkpoint, tmp_path, threaded=True)
    kept, dropped = runtime.generate([IMAGE], PROMPT, LONG), runtime.generate([IMAGE], PROMPT, LONG)
    next(kept)
    garbage: list[object] = [dropped, runtime.open_images([IMAGE])]
    garbage.append(garbage)
    del dropped, garbage
    inside = threading.Event()

    class Collects(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == "test":
                inside.set()
                time.sleep(0.5)  # the engine comes to its own message meanwhile
                gc.collect()

    handler = Collects()
    for name in ("test", "avl_edge"):
        logging.getLogger(name).addHandler(handler)
    try:
        thread = threading.Thread(target=lambda: logging.getLogger("test").warning("collect"), daemon=True)
        thread.start()
        assert inside.wait(LIMIT)
        write(tmp_path, GB)
        waiting = runtime.generate([IMAGE], PROMPT, SHORT)
        thread.join(LIMIT)
        assert not thread.is_alive()
        write(tmp_path, 6 * GB)
        assert waiting.result(LIMIT).finish_reason == "length"
    finally:
        for name in ("test", "avl_edge"):
            logging.getLogger(name).removeHandler(handler)
    runtime.close()


def test_threads_that_ask_bring_no_threads_that_compute(checkpoint: Checkpoints) -> None:
    """torch keeps a team of OpenMP threads for each thread that calls it: the engine's is the only one."""
    program = f"""
    import os, threading, torch
    from avl_edge import Options, Runtime
    torch.set_num_threads(4)
    with Runtime.load({str(checkpoint("mistral-gqa"))!r}) as runtime:
        def ask():
            runtime.generate([], "How many?", Options(max_new_tokens=4, temperature=1.0)).result()
            seen.append(len(os.listdir("/proc/self/task")))
        seen = []
        ask()
        threads = [threading.Thread(target=ask) for _ in range(6)]
        [each.start() for each in threads], [each.join() for each in threads]
        print(seen[0], max(seen))
    """
    alone, together = map(int, _python(program, OMP_NUM_THREADS="4").split())
    assert together <= alone + 6, "the six that ask"


def _python(program: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=3 * LIMIT,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_requests_wait_while_memory_comes_and_goes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Nobody who waits is taken for somebody whom the runtime does not know."""
    write(tmp_path, 6 * GB)
    runtime = watchful(checkpoint, tmp_path, threaded=True)
    problems: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(8):
                assert runtime.generate([], "How many?", SHORT).result(LIMIT).finish_reason == "length"
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        write(tmp_path, GB)
        time.sleep(0.01)
        write(tmp_path, 6 * GB)
        time.sleep(0.01)
    assert problems == []
    runtime.close()


class TestClose:
    def test_it_cancels_frees_and_ends(self, checkpoint: Checkpoints) -> None:
        before = engine_threads()
        runtime = Runtime.load(checkpoint("mistral-gqa"))
        session = runtime.open_images([IMAGE])
        generations = [session.ask(PROMPT, LONG), runtime.generate([IMAGE], PROMPT, LONG)]
        next(generations[0])
        backend = weakref.ref(runtime.debug.backend)
        assert engine_threads() == before + 1
        runtime.close()
        runtime.close()
        assert [each.result().finish_reason for each in generations] == ["cancelled"] * 2
        assert engine_threads() == before
        gc.collect()
        assert backend() is None, "the weights are free"
        assert runtime.kv_bytes_in_use == 0
        session.close()
        for refused in (
            lambda: runtime.generate([IMAGE], PROMPT, SHORT),
            lambda: runtime.load_weights(),
            lambda: runtime.engine.submit(generations[1].request),
        ):
            with pytest.raises(EngineClosed):
                refused()

    def test_it_waits_for_who_is_on_its_way(self, runtime: Runtime) -> None:
        generations = [runtime.generate([IMAGE], PROMPT, SHORT) for _ in range(3)]
        runtime.close(drain=True)
        assert [each.finish_reason for each in generations] == ["length"] * 3

    def test_nobody_comes_in_while_it_waits(self, runtime: Runtime) -> None:
        with stopped(runtime) as stop:
            generation = runtime.generate([IMAGE], PROMPT, LONG)
            assert stop.reached.wait(LIMIT)
            closing = threading.Thread(target=lambda: runtime.close(drain=True))
            closing.start()
            with pytest.raises(EngineClosed, match="load another one"):
                _until_refused(runtime)
        closing.join(LIMIT)
        assert generation.result().finish_reason == "length"

    @pytest.mark.parametrize("threaded", [True, False])
    def test_what_was_never_used_is_closed(self, checkpoint: Checkpoints, threaded: bool) -> None:
        before = engine_threads()
        with Runtime.open(checkpoint("mistral-gqa"), threaded=threaded) as runtime:
            session = runtime.open_images([IMAGE])
            session.close()
            assert runtime.kv_bytes_in_use == 0
            assert engine_threads() == before
        with pytest.raises(EngineClosed):
            runtime.generate([IMAGE], PROMPT)

    def test_who_has_it_no_more_ends_it(self, checkpoint: Checkpoints) -> None:
        before = engine_threads()
        runtime = Runtime.load(checkpoint("mistral-gqa"))
        generation = runtime.generate([IMAGE], PROMPT, SHORT)
        session = runtime.open_images([IMAGE])
        session.load()
        del runtime, session
        assert generation.result().finish_reason == "length", "a request keeps its engine"
        del generation
        gc.collect()
        end = time.monotonic() + LIMIT
        while engine_threads() > before and time.monotonic() < end:
            time.sleep(0.01)
        assert engine_threads() == before

    def test_the_interpreter_ends_in_the_middle_of_an_answer(self, checkpoint: Checkpoints) -> None:
        program = f"""
        from avl_edge import Options, Runtime
        runtime = Runtime.load({str(checkpoint("mistral-gqa"))!r})
        generations = [runtime.generate([], "How many?", Options(max_new_tokens=300)) for _ in range(4)]
        print(next(generations[0]).token_id)
        """
        assert _python(program).strip().isdigit()

    def test_a_forked_process_says_what_to_do(self, checkpoint: Checkpoints) -> None:
        program = f"""
        import os
        from avl_edge import Options, Runtime
        from avl_edge.errors import EngineClosed
        runtime = Runtime.load({str(checkpoint("mistral-gqa"))!r})
        runtime.generate([], "How many?", Options(max_new_tokens=3)).result()
        if os.fork() == 0:
            try:
                runtime.generate([], "How many?", Options(max_new_tokens=3))
            except EngineClosed as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()
        print(runtime.generate([], "How many?", Options(max_new_tokens=3)).result().finish_reason)
        """
        assert _python(program).splitlines() == [
            "the engine's thread is not in this process: load a runtime after the fork",
            "length",
        ]


class TestLoad:
    def test_what_is_wrong_is_said_to_who_loads(self, checkpoint: Checkpoints) -> None:
        with Runtime.open(checkpoint("mistral-gqa")) as runtime:
            with pytest.raises(BadInput, match="at least one page"):
                runtime.load_weights(pool_bytes=1)
            assert runtime.generate([], PROMPT, SHORT).result().finish_reason == "length", "it loads when it is asked"
            with pytest.raises(BadInput, match="loaded already"):
                runtime.load_weights()

    def test_an_interrupt_ends_it(self, checkpoint: Checkpoints) -> None:
        """Ctrl-C comes to the thread that waits; the engine's stops at the next tensor, and may be asked again."""
        runtime, tensors = Runtime.open(checkpoint("mistral-gqa")), []

        def interrupts(done: int, _: int) -> None:
            tensors.append(done)
            if done == 2:
                os.kill(os.getpid(), 2)
                time.sleep(0.3)

        with pytest.raises(KeyboardInterrupt):
            runtime.load_weights(progress=interrupts)
        assert runtime.generate([], PROMPT, SHORT).result().finish_reason == "length"
        assert len(tensors) <= 3
        runtime.close()
