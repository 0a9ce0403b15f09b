"""Image sessions that are closed, dropped, interrupted, and short of memory: no row is lost, no promise broken."""

from __future__ import annotations

import gc
import re
import signal
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from avl_edge import BadInput, DoesNotFit, Formats, Generation, ImageSession, Options, Runtime
from avl_edge.kv.layout import page_bytes
from avl_edge.kv.pool import BorrowingRows, SequenceRows
from avl_edge.planning.request_planner import PACKED
from tests.conftest import Checkpoints
from tests.equipment.image_sessions import AVL, FIRST, FULL, IMAGES, SECOND, WHOLE, check, is_empty
from tests.equipment.machines import GB, write


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Runtime:
    return Runtime.load(checkpoint("mistral-gqa"))


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
    monkeypatch.setattr(runtime.debug.backend, "prefill_prefix", None)
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
    decode = runtime.debug.backend.decode  # type: ignore[union-attr]

    def drop(*arguments: Any) -> Tensor:
        sessions.clear()
        gc.collect()
        held.append(len(runtime.debug.scheduler.prefixes))
        return decode(*arguments)

    next(plain)
    monkeypatch.setattr(runtime.debug.backend, "decode", drop)
    next(plain)
    assert held == [1]
    check(runtime, plain)
    assert not runtime.debug.scheduler.prefixes


@pytest.mark.parametrize("stage", ["prefill_prefix", "prefill", "decode"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_what_breaks_in_a_step_leaves_other_sessions(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, stage: str, kind: type[BaseException]
) -> None:
    """An image session that was being run is run anew for the next question; one that was there stays."""
    other, session = runtime.open_images(IMAGES[1:], FULL), runtime.open_images(IMAGES[:1], FULL)
    expected = other.ask(FIRST).result().token_ids
    if stage != "prefill_prefix":
        session.load()
    question = session.ask(SECOND)

    def fail(*_: object) -> None:
        raise kind("broken")

    with monkeypatch.context() as patch:
        patch.setattr(runtime.debug.backend, stage, fail)
        with pytest.raises(kind):
            question.result()
    assert question.finish_reason == ("error" if kind is RuntimeError else "cancelled")
    check(runtime)
    assert (session.stats.bytes_stored > 0) == (stage != "prefill_prefix")
    assert other.ask(FIRST).result().token_ids == expected
    plain = runtime.generate(IMAGES[:1], SECOND, FULL).result()
    assert session.ask(SECOND).result().token_ids == plain.token_ids
    session.close(), other.close()
    assert is_empty(runtime)


def test_real_interrupts_at_any_moment_lose_no_row(runtime: Runtime) -> None:
    """A timer interrupts thirty looks, each a little later than the one before, while another session is open."""

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
    ours = re.compile("(serving/(runtime|scheduler|image_session|generation)|kv/(shared_prefix|pool/.*))[.]py")
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
    for code, count in calls.items():
        for which in sorted({1, min(2, count), count}):
            run((code, which))
            check(runtime)
            assert len(runtime.debug.scheduler.prefixes) == 1, code
    assert kept.ask(FIRST).result().token_ids == expected
    kept.close()
    assert is_empty(runtime)


def test_budgets_are_kept_apart(runtime: Runtime) -> None:
    """The session's is for the picture, which is packed as far as it asks; a question's is for its own rows."""
    exact, half = (runtime.open_images(IMAGES, Options(formats=each)).peak_bytes for each in (Formats(), PACKED[0]))
    found = []
    for budget in (exact, exact - 1, half - 1):
        with runtime.open_images(IMAGES, Options(kv_budget=budget, max_new_tokens=8)) as session:
            kv = session.ask(FIRST).result().kv
            stats = session.stats
            assert stats.bytes_peak <= budget == stats.bytes_budget
            assert kv.bytes_budget is None
            assert kv.bytes_shared == stats.bytes_stored
            found.append(stats.formats["core"])
    assert found == ["exact", "int8", "int4"]
    with pytest.raises(DoesNotFit, match=r"does not hold the \d+ tokens of the session") as refusal:
        runtime.open_images(IMAGES, Options(kv_budget=1000))
    least = _smallest(refusal.value)
    runtime.open_images(IMAGES, Options(kv_budget=least))
    with pytest.raises(DoesNotFit):
        runtime.open_images(IMAGES, Options(kv_budget=least - 1))
    with pytest.raises(DoesNotFit):
        runtime.open_images(IMAGES, Options(kv_budget=least, formats=Formats()))
    session = runtime.open_images(IMAGES)
    with pytest.raises(DoesNotFit, match="tokens of the question and 8 new ones") as refusal:
        session.ask(FIRST, Options(kv_budget=1000, max_new_tokens=8))
    least = _smallest(refusal.value)
    kv = session.ask(FIRST, Options(kv_budget=least, max_new_tokens=8)).result().kv
    assert kv.bytes_peak == least == kv.bytes_budget
    with pytest.raises(DoesNotFit):
        session.ask(FIRST, Options(kv_budget=least - 1, max_new_tokens=8))


def _smallest(refusal: DoesNotFit) -> int:
    found = re.search(r"smallest that would do is .*\((\d+) bytes\)", str(refusal))
    assert found
    return int(found[1])


def test_questions_wait_for_the_pool_and_what_open_sessions_hold_is_refused(checkpoint: Checkpoints) -> None:
    directory = checkpoint("mistral-gqa")
    planned = Runtime.open(directory).open_images(IMAGES[:1], FULL)
    session_bytes, own = planned.peak_bytes, planned.prepare(FIRST).plan.peak_bytes
    runtime = Runtime.load(directory, pool_bytes=session_bytes + own)
    with runtime.open_images(IMAGES[:1], FULL) as session:
        waiting = [session.ask(FIRST) for _ in range(3)]
        assert len({each.result().token_ids for each in waiting}) == 1
        other = runtime.open_images(IMAGES[1:], FULL)
        question, plain = other.ask(FIRST), runtime.generate(IMAGES[:1], FIRST, AVL)
        for each in (question, plain):
            with pytest.raises(DoesNotFit, match="open image sessions hold the rows that this needs"):
                each.result()
        check(runtime)
        assert session.ask(FIRST).result().token_ids == waiting[0].result().token_ids
    assert len(other.ask(FIRST).result().token_ids) == 24
    plain, last = runtime.generate(IMAGES[:1], FIRST, AVL), other.ask(FIRST)
    other.close()
    assert len(plain.result().token_ids) == 24, "once the session's last question, asked later, has freed it"
    assert last.result().finish_reason == "length"
    with pytest.raises(DoesNotFit, match="the whole pool has"):
        runtime.open_images(IMAGES[:1]).ask(FIRST, Options(max_new_tokens=200))
    assert is_empty(runtime)


def test_short_memory_leaves_shared_rows_alone(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A plain request beside them is packed, then nobody is admitted; the session's answers stay what they were."""
    write(tmp_path, 6 * GB)
    runtime = Runtime.load(checkpoint("mistral-gqa"))
    runtime.keep_free(2 * GB, root=tmp_path, every_ms=0)
    session = runtime.open_images(IMAGES[:1], AVL)
    expected = session.ask(SECOND).result()
    question, plain = session.ask(SECOND), runtime.generate(IMAGES[:1], SECOND, FULL)
    next(question), next(plain)
    write(tmp_path, GB)
    result = question.result()
    assert plain.cache is not None
    assert plain.cache.formats.core != "exact"
    assert result.token_ids == expected.token_ids
    assert vars(result.kv.pressure) | {"waited_ms": 0.0} == vars(expected.kv.pressure) | {"waited_ms": 0.0}
    check(runtime, plain)
    late = session.ask(FIRST)
    runtime.step()
    assert late.cache is None, "nobody is admitted"
    write(tmp_path, 6 * GB)
    late.result()


class SessionLife(RuleBasedStateMachine):
    """Looks, questions, plain requests, steps, closes, drops and broken steps in any order, over one small pool.

    At every moment the pool's books are in order and each lease holds what was planned for it at most; in the end it is
    empty. An answer that came to its end is a plain request's, whatever went on beside it.
    """

    directory: Path
    alone: dict[tuple[int, int, str], tuple[int, ...]]
    pictures: list[str]

    @initialize(pages=st.integers(10, 40))
    def load(self, pages: int) -> None:
        runtime = Runtime.open(self.directory)
        runtime.load_weights(pool_bytes=pages * page_bytes(runtime.kv_shape))
        self.runtime = runtime
        self.sessions: list[ImageSession] = []
        self.asked: list[tuple[Generation, tuple[int, int, str]]] = []

    @rule(picture=st.sampled_from([0, 1]), packed=st.booleans(), share=st.sampled_from([100, 30]), load=st.booleans())
    def open_session(self, picture: int, packed: bool, share: int, load: bool) -> None:
        options = Options("distinct", {"secondary": share}, PACKED[0] if packed else None)
        session = self.runtime.open_images(IMAGES[picture : picture + 1], options)
        self.sessions.append(session)
        if load:
            with suppress(DoesNotFit):
                assert session.load().bytes_peak == session.peak_bytes

    @precondition(lambda self: bool(self.sessions))
    @rule(choice=st.integers(0, 99), method=st.integers(0, 3), prompt=st.sampled_from([FIRST, SECOND]))
    def ask(self, choice: int, method: int, prompt: str) -> None:
        session = self.sessions[choice % len(self.sessions)]
        with suppress(DoesNotFit):
            question = session.ask(prompt, METHODS[method])
            picture = self.pictures.index(question.prompt.spans[0].digest)
            whole = question.request.prefix.share == 100 and session.stats.formats["core"] == "exact"
            known = (picture if whole else -1, method, prompt)
            self.asked.append((question, known))

    @rule(picture=st.sampled_from([0, 1]), method=st.integers(0, 3))
    def ask_plainly(self, picture: int, method: int) -> None:
        with suppress(DoesNotFit):
            request = self.runtime.generate(IMAGES[picture : picture + 1], FIRST, METHODS[method])
            self.asked.append((request, (picture, method, FIRST)))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.runtime.step()

    @precondition(lambda self: bool(self.sessions))
    @rule(choice=st.integers(0, 99), drop=st.booleans())
    def close(self, choice: int, drop: bool) -> None:
        session = self.sessions.pop(choice % len(self.sessions))
        if not drop:
            session.close()

    @precondition(lambda self: bool(self.asked))
    @rule(choice=st.integers(0, 99))
    def cancel(self, choice: int) -> None:
        self.asked.pop(choice % len(self.asked))[0].close()

    @rule(
        stage=st.sampled_from(["prefill_prefix", "prefill", "decode"]),
        kind=st.sampled_from([ValueError, KeyboardInterrupt]),
    )
    def break_a_step(self, stage: str, kind: type[BaseException]) -> None:
        def fail(*_: object) -> None:
            raise kind

        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(self.runtime.debug.backend, stage, fail)
            self.runtime.step()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "runtime"):
            return
        running = self.runtime.debug.scheduler.running
        looks = [look for look in self.runtime.debug.scheduler.prefixes if look.cache]
        pairs = [(each.cache, each.request.plan) for each in running] + [(look.cache, look.plan) for look in looks]
        self.runtime.debug.pool.check_integrity([cache.rows for cache, _ in pairs if cache])
        for cache, plan in pairs:
            assert cache is not None
            lease = cache.rows.lease
            assert lease.held <= lease.peak <= lease.limit == plan.pages
        assert self.runtime.kv_bytes_in_use == sum(cache.rows.lease.nbytes for cache, _ in pairs if cache)
        for generation, known in self.asked:
            if generation.finish_reason == "length":
                result = generation.result()
                assert result.kv.bytes_peak == generation.request.plan.peak_bytes
                assert known[0] < 0 or result.token_ids == self.alone[known]

    def teardown(self) -> None:
        if not hasattr(self, "runtime"):
            return
        for session in self.sessions:
            session.close()
        while self.runtime.step():
            self.sound()
        assert all(generation.finish_reason for generation, _ in self.asked)
        self.sound()
        assert is_empty(self.runtime)


METHODS = [
    Options(max_new_tokens=6),
    Options(method="avl", parameters={**WHOLE, "text_keep": 50, "text_floor": 4}, max_new_tokens=7),
    Options(method="avl", parameters={**WHOLE, "core": 10, "refresh": 2, "prompt_mean": 1}, max_new_tokens=5),
    Options(method="coarse", parameters={"core": 20}, max_new_tokens=4),
]


def test_any_order_of_looks_questions_and_ends(checkpoint: Checkpoints) -> None:
    directory = checkpoint("llama-mha", dtype=torch.float64)
    runtime = Runtime.load(directory)
    alone, pictures = {}, []
    for picture, image in enumerate(IMAGES):
        for prompt in (FIRST, SECOND):
            for method, options in enumerate(METHODS):
                generation = runtime.generate([image], prompt, options)
                alone[picture, method, prompt] = generation.result().token_ids
        pictures.append(generation.prompt.spans[0].digest)
    SessionLife.directory, SessionLife.alone, SessionLife.pictures = directory, alone, pictures
    run_state_machine_as_test(SessionLife, settings=settings(max_examples=40, stateful_step_count=25, deadline=None))
