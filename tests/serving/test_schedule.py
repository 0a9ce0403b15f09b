"""Who is served when: order, ageing, deadlines, and how long a running answer waits while pictures arrive."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from avl_edge import Generation, Options, Runtime
from avl_edge.model.demo import DEMO
from avl_edge.model.prompt import Processor
from avl_edge.serving.requests import Running
from avl_edge.serving.schedule_policy import PATIENCE, Advance, Decode, FirstComeFirstServed
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.short_memory import IMAGE, PROMPT

LONG, SHORT = Options(max_new_tokens=200), Options(max_new_tokens=4)


def _sequence(submitted: float, priority: int = 0, deadline: float | None = None) -> Running:
    due = None if deadline is None else submitted + deadline
    return Running(None, None, None, priority, due, submitted=submitted)  # type: ignore[arg-type]


class TestOrder:
    @given(st.lists(st.integers(0, 1000), max_size=12))
    def test_first_come_first_served(self, times: list[int]) -> None:
        waiting = [_sequence(time) for time in times]
        ordered = FirstComeFirstServed().order(waiting, 1000.0)
        assert [each.submitted for each in ordered] == sorted(times)

    def test_a_priority_overtakes_those_who_came_lately(self) -> None:
        """And nobody for ever: who has waited long enough is served before a newcomer of any priority."""
        old, lately, urgent = _sequence(0.0), _sequence(PATIENCE), _sequence(PATIENCE + 1, priority=1)
        assert FirstComeFirstServed().order([old, lately, urgent], 30.0) == [old, urgent, lately]
        pressing = [_sequence(0.0), *(_sequence(float(second), priority=2) for second in range(1, 60))]
        order = FirstComeFirstServed().order(pressing, 60.0)
        assert order.index(pressing[0]) == 2 * PATIENCE - 1, "who comes when it has waited so long comes behind it"

    def test_a_deadline_that_is_near_comes_first(self) -> None:
        plain, late, near = _sequence(0.0), _sequence(1.0, deadline=3600.0), _sequence(2.0, deadline=1.0)
        assert FirstComeFirstServed().order([plain, late, near], 2.0) == [near, plain, late]

    def test_an_urgent_request_is_heard_between_two_layers(self, checkpoint: Checkpoints) -> None:
        """Its prompt runs before the rest of one that had begun, and both are answered as alone."""
        runtime = Runtime.load(checkpoint("mistral-gqa"), threaded=False)
        requests = [runtime.prepare([random_image(seed, (60, 60))], PROMPT, SHORT) for seed in (1, 2)]
        expected = [runtime.submit(request).result().token_ids for request in requests]
        first = runtime.submit(requests[0])
        for _ in range(3):
            runtime.debug.engine.run_once()
        assert first.cache is not None
        urgent = runtime.submit(requests[1], priority=1)
        while urgent.finish_reason is None:
            runtime.debug.engine.run_once()
        assert first.finish_reason is None
        assert [first.result().token_ids, urgent.result().token_ids] == expected

    def test_a_session_s_picture_is_run_by_one_question(self, checkpoint: Checkpoints) -> None:
        """An urgent question about a picture that is being run waits for it, instead of running it again."""
        runtime = Runtime.load(checkpoint("mistral-gqa"), threaded=False)
        session = runtime.open_images([IMAGE], SHORT)
        requests = [session.prepare(prompt) for prompt in ("How many?", PROMPT)]
        first = runtime.submit(requests[0])
        for _ in range(3):
            runtime.debug.engine.run_once()
        urgent = runtime.submit(requests[1], priority=5)
        expected = runtime.generate([IMAGE], PROMPT, SHORT).result().token_ids
        assert urgent.result().token_ids == expected
        first.close()
        again = runtime.submit(requests[0])
        assert again.result().finish_reason == "length"


class TestInterleaving:
    def test_at_most_one_layer_between_two_tokens(self, checkpoint: Checkpoints) -> None:
        """While 15 pictures arrive, one every other turn; and every one of them is answered."""
        runtime = Runtime.load(checkpoint("mistral-gqa"), threaded=False)
        requests = [runtime.prepare([random_image(seed, (60, 60))], PROMPT, SHORT) for seed in range(15)]
        running = runtime.generate([], PROMPT, LONG)
        next(running)
        log, generations = watched(runtime), list[Generation]()
        while requests or any(each.finish_reason is None for each in generations):
            runtime.debug.engine.run_once()
            if requests and len(log) % 2:
                generations.append(runtime.submit(requests.pop()))
        assert running.finish_reason is None
        done = "".join(each.what for each in log)
        layers = max(runtime.spec.feature_layers) + runtime.spec.text.layers
        assert done.count("L") == 15 * layers
        assert "LL" not in done

    def test_a_prompt_that_runs_whole_is_followed_by_as_many_steps(self) -> None:
        schedule, runs, waits = FirstComeFirstServed(steps=3), [_sequence(0.0)], [_sequence(1.0)]
        choices = [schedule.choose(waits, runs, 2.0) for _ in range(9)]
        assert choices == [Advance(waits[0], 1), *[Decode(runs)] * 3] * 2 + [Advance(waits[0], 1)]
        assert schedule.choose(waits, [], 2.0) == Advance(waits[0], 1), "nobody waits for steps of nobody"
        assert schedule.choose([], [], 2.0) is None

    @pytest.mark.slow
    def test_the_longest_wait_of_a_running_answer(self) -> None:
        """On the demo model, in seconds of the engine's thread: at most 0.6 of what one prompt takes alone, while 15
        pictures arrive."""
        with Runtime.load("demo") as runtime:
            pictures = [Image.fromarray(np.full((336, 336, 3), 10 * number, np.uint8)) for number in range(18)]
            requests = [runtime.prepare([picture], "What is the speed?", SHORT) for picture in pictures]
            log, alone = watched(runtime), list[float]()
            for request in requests[15:]:
                log.clear()
                runtime.submit(request).result()
                layers = [each for each in log if each.what == "L"]
                alone.append(layers[-1].end - layers[0].begin)
            never = dict.fromkeys(Processor.of(runtime.spec, DEMO).eos_token_ids, -100.0)
            endless = Options(max_new_tokens=400, logit_bias=never)
            running = runtime.submit(runtime.prepare([], "Describe the picture in detail.", endless))
            next(running)
            log.clear()
            arriving = [runtime.submit(request) for request in requests[:15]]
            for each in arriving:
                each.result()
            assert running.finish_reason is None, "it was to run as long as they arrive"
            steps = [each.end for each in log if each.what != "L"]
            waits = [after - before for before, after in pairwise(steps)]
            assert max(waits) <= 0.6 * min(alone), (max(waits), alone)


class Done(NamedTuple):
    """What a backend did: ``L`` for a layer, the batch of a step; and when, in seconds of the thread that did it."""

    what: str
    begin: float
    end: float


def watched(runtime: Runtime) -> list[Done]:
    """What the runtime's backend does from now on."""
    log, backend = list[Done](), runtime.debug.backend
    assert backend is not None

    def timed(what: str, function: Callable[[], Any]) -> Any:
        begin = time.thread_time()
        result = function()
        log.append(Done(what, begin, time.thread_time()))
        return result

    class Layers:
        def __init__(self, task: Any) -> None:
            self._task = task

        def advance(self, layers: int) -> Any:
            return timed("L" * layers, lambda: self._task.advance(layers))

    class Watched:
        name, rows = backend.name, backend.rows

        def begin_encode(self, *arguments: Any) -> Layers:
            return Layers(backend.begin_encode(*arguments))

        def begin_prefill(self, *arguments: Any) -> Layers:
            return Layers(backend.begin_prefill(*arguments))

        def decode(self, token_ids: Any, *arguments: Any, **named: Any) -> Any:
            return timed(str(len(token_ids)), lambda: backend.decode(token_ids, *arguments, **named))

    runtime.debug.replace_backend(Watched())  # type: ignore[arg-type]
    return log
