"""Image sessions that are closed, dropped and interrupted: no row is lost."""

from __future__ import annotations

import gc
import re
import signal
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType

import pytest

from avl_edge import BadInput, Generation, Runtime
from avl_edge.errors import StepFailed
from avl_edge.kv.pool import BorrowingRows, SequenceRows
from tests.conftest import Checkpoints
from tests.equipment.broken_backend import STAGES, before
from tests.equipment.image_sessions import AVL, FIRST, FULL, IMAGES, SECOND, check, is_empty


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Runtime:
    return Runtime.load(checkpoint("mistral-gqa"), threaded=False)


def test_a_closed_session_ends_with_its_last_question(runtime: Runtime) -> None:
    with runtime.open_images(IMAGES[:1], AVL) as session:
        expected = session.ask(SECOND).result().token_ids
    running, waiting = _two(runtime)
    session.close()
    assert running.result().token_ids == waiting.result().token_ids == expected
    assert is_empty(runtime)


def _two(runtime: Runtime) -> tuple[Generation, Generation]:
    """A question that runs and one that waits, about an image session that is closed and dropped."""
    session = runtime.open_images(IMAGES[:1], AVL)
    running = session.ask(SECOND)
    next(running)
    waiting, prepared = session.ask(SECOND), session.prepare(SECOND)
    session.close()
    session.close()
    for refused in (lambda: session.ask(FIRST), lambda: runtime.submit(prepared), session.load):
        with pytest.raises(BadInput, match="the session is closed: open the pictures again"):
            refused()
    assert session.stats.bytes_stored > 0, "the question that runs reads them"
    return running, waiting


def test_a_closed_session_waits_for_its_first_question(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture was run before the session was closed; it is not run again."""
    session = runtime.open_images(IMAGES[:1], FULL)
    session.load()
    question = session.ask(FIRST)
    session.close()
    assert runtime.kv_bytes_in_use > 0
    before(monkeypatch, runtime.debug.backend, "prefix", lambda: pytest.fail("the picture is run again"))
    assert question.result().token_ids == runtime.generate(IMAGES[:1], FIRST, FULL).result().token_ids
    assert is_empty(runtime)


@pytest.mark.parametrize("rows", [BorrowingRows, SequenceRows], ids=["a question's", "the session's"])
def test_an_interrupt_while_rows_are_freed_loses_none(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, rows: type[SequenceRows]
) -> None:
    session = runtime.open_images(IMAGES[:1], FULL)
    question, plain = session.ask(FIRST), runtime.generate(IMAGES[:1], FIRST, FULL)
    next(question), next(plain)
    session.close()
    close = SequenceRows.close

    def interrupted(self: SequenceRows) -> None:
        if type(self) is rows:
            pool_ids = next(ids for _, ids in self.held() if len(ids))
            self.pool.release(pool_ids[::2], self.lease, self.formats.text)
            raise KeyboardInterrupt
        close(self)

    with monkeypatch.context() as patch:
        patch.setattr(SequenceRows, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            question.close()
    check(runtime, plain)
    assert not runtime.debug.scheduler.prefixes
    plain.close()
    assert is_empty(runtime)


def test_a_session_that_is_dropped_is_closed(runtime: Runtime) -> None:
    answer = runtime.open_images(IMAGES[:1], FULL).ask(FIRST)
    gc.collect()
    assert len(answer.result().token_ids) == 24
    assert is_empty(runtime)
    session = runtime.open_images(IMAGES[:1], FULL)
    session.load()
    assert runtime.kv_bytes_in_use > 0
    del session
    gc.collect()
    assert is_empty(runtime)


def test_a_session_dropped_in_the_middle_of_a_step_is_freed_after_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [runtime.open_images(IMAGES[:1], FULL)]
    sessions[0].load()
    plain = runtime.generate(IMAGES[:1], FIRST, FULL)
    held: list[int] = []

    def drop() -> None:
        sessions.clear()
        gc.collect()
        held.append(len(runtime.debug.scheduler.prefixes))

    next(plain)
    before(monkeypatch, runtime.debug.backend, "decode", drop)
    next(plain)
    assert held == [1]
    check(runtime, plain)
    assert not runtime.debug.scheduler.prefixes


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_what_breaks_in_a_step_leaves_other_sessions(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, stage: str, kind: type[BaseException]
) -> None:
    """An image session that was being run is run anew for the next question; one that was there stays."""
    other, session = runtime.open_images(IMAGES[1:], FULL), runtime.open_images(IMAGES[:1], FULL)
    expected = other.ask(FIRST).result().token_ids
    if stage != "prefix":
        session.load()
    question = session.ask(SECOND)

    def fail() -> None:
        raise kind("broken")

    with monkeypatch.context() as patch:
        before(patch, runtime.debug.backend, stage, fail)
        with pytest.raises(StepFailed if kind is RuntimeError else kind, match="broken"):
            question.result()
    assert question.finish_reason == ("error" if kind is RuntimeError else "cancelled")
    check(runtime)
    assert (session.stats.bytes_stored > 0) == (stage != "prefix")
    assert other.ask(FIRST).result().token_ids == expected
    plain = runtime.generate(IMAGES[:1], SECOND, FULL).result()
    assert session.ask(SECOND).result().token_ids == plain.token_ids
    session.close(), other.close()
    assert is_empty(runtime)


def test_real_interrupts_at_any_moment_lose_no_row(runtime: Runtime) -> None:
    """A timer interrupts thirty image sessions, each a little later than the last, while another one is open."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    usual, interrupted = signal.signal(signal.SIGALRM, interrupt), 0
    kept = runtime.open_images(IMAGES[1:], AVL)
    expected = kept.ask(FIRST).result().token_ids
    try:
        for run in range(30):
            session = runtime.open_images(IMAGES[:1], AVL)
            both = [session.ask(prompt) for prompt in (FIRST, SECOND)]
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0007 * run)
                both[0].result()
                session.close()
                both[1].result()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            for each in both:
                each.close()
            session.close()
            check(runtime)
            assert len(runtime.debug.scheduler.prefixes) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert interrupted > 5
    assert kept.ask(FIRST).result().token_ids == expected
    kept.close()
    assert is_empty(runtime)


def test_an_interrupt_at_a_call_of_any_function_leaves_the_books_in_order(runtime: Runtime) -> None:
    """Where a function begins, Python lets an interrupt in: at the first, second and last call of each of ours."""
    kept = runtime.open_images(IMAGES[1:], AVL)
    ours = re.compile(
        "(serving/(runtime|scheduler|model_runner|image_session|generation)|kv/(shared_prefix|store|formats|pool/.*))[.]py"
    )
    expected = kept.ask(FIRST).result().token_ids

    def run(wanted: tuple[CodeType, int] | None) -> Counter[CodeType]:
        """The calls of each function, up to the one that is interrupted."""
        calls: Counter[CodeType] = Counter()

        def called(frame: FrameType, event: str, _: object) -> None:
            code = frame.f_code
            if event == "call" and code.co_name != "<genexpr>" and ours.search(code.co_filename):
                calls[code] += 1
                if (code, calls[code]) == wanted:
                    raise KeyboardInterrupt

        session = runtime.open_images(IMAGES[:1], AVL)
        both = [session.ask(prompt) for prompt in (FIRST, SECOND)]
        with suppress(KeyboardInterrupt):
            sys.setprofile(called)
            try:
                both[0].result()
                session.close()
                both[1].result()
            finally:
                sys.setprofile(None)
        for each in both:
            each.close()
        session.close()
        return calls

    calls = run(None)
    assert len(calls) > 40
    assert {"model_runner.py", "store.py"} <= {Path(code.co_filename).name for code in calls}
    for code, count in calls.items():
        for which in sorted({1, min(2, count), count}):
            run((code, which))
            check(runtime)
            assert len(runtime.debug.scheduler.prefixes) == 1, code
    assert kept.ask(FIRST).result().token_ids == expected
    kept.close()
    assert is_empty(runtime)
