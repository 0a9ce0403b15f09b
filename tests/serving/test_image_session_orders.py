"""Image sessions, questions and plain requests that begin, break and end in any order."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

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

from avl_edge import DoesNotFit, Generation, ImageSession, Options, Runtime
from avl_edge.kv.layout import page_bytes
from avl_edge.planning.request_planner import PACKED
from tests.conftest import Checkpoints
from tests.equipment.broken_backend import STAGES, before
from tests.equipment.image_sessions import FIRST, IMAGES, SECOND, WHOLE, is_empty


class SessionLife(RuleBasedStateMachine):
    """Sessions, questions, plain requests, steps, closes, drops and broken steps in any order, over one small pool.

    At every moment the pool's books are in order and each lease holds what was planned for it at most; in the end it is
    empty. An answer that came to its end is a plain request's, whatever went on beside it.
    """

    directory: Path
    alone: dict[tuple[int, int, str], tuple[int, ...]]
    pictures: list[str]

    @initialize(pages=st.integers(10, 40))
    def load(self, pages: int) -> None:
        runtime = Runtime.open(self.directory, threaded=False)
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
            self.runtime.debug.engine.run_once()

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
        stage=st.sampled_from(STAGES),
        kind=st.sampled_from([ValueError, KeyboardInterrupt]),
    )
    def break_a_step(self, stage: str, kind: type[BaseException]) -> None:
        def fail() -> None:
            raise kind

        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            before(patch, self.runtime.debug.backend, stage, fail)
            self.runtime.debug.engine.run_once()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "runtime"):
            return
        running = self.runtime.debug.scheduler.running
        pairs = [(each.cache, each.request.plan) for each in running]
        pairs += [(each.cache, each.plan) for each in self.runtime.debug.scheduler.prefixes if each.cache]
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
        while self.runtime.debug.engine.run_once():
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


def test_any_order_of_sessions_questions_and_ends(checkpoint: Checkpoints) -> None:
    directory = checkpoint("llama-mha", dtype=torch.float64)
    runtime = Runtime.load(directory, threaded=False)
    alone, pictures = {}, []
    for picture, image in enumerate(IMAGES):
        for prompt in (FIRST, SECOND):
            for method, options in enumerate(METHODS):
                generation = runtime.generate([image], prompt, options)
                alone[picture, method, prompt] = generation.result().token_ids
        pictures.append(generation.prompt.spans[0].digest)
    SessionLife.directory, SessionLife.alone, SessionLife.pictures = directory, alone, pictures
    run_state_machine_as_test(SessionLife, settings=settings(max_examples=40, stateful_step_count=25, deadline=None))
