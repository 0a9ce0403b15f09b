"""A submitted request, for threads and coroutines: events, results, ends, and who is waiting when they come."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from avl_edge import BadInput, Options, Runtime
from avl_edge.errors import DeadlineExceeded
from avl_edge.serving.handle import Handle
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.slow_backend import LIMIT, stopped

IMAGE, PROMPT = random_image(3, (120, 80)), "Describe the picture in detail."
SHORT, LONG = Options(max_new_tokens=12), Options(max_new_tokens=200)


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Iterator[Runtime]:
    with Runtime.load(checkpoint("mistral-gqa")) as runtime:
        yield runtime


def _submit(runtime: Runtime, options: Options = SHORT) -> Handle:
    return runtime.engine.submit(runtime.prepare([IMAGE], PROMPT, options))


class TestThreads:
    def test_events_are_those_of_a_generation(self, runtime: Runtime) -> None:
        expected = list(runtime.generate([IMAGE], PROMPT, SHORT))
        handle = _submit(runtime)
        assert list(handle.events()) == expected
        assert list(handle.events()) == [], "taken once"
        assert handle.result().token_ids == tuple(event.token_id for event in expected)

    def test_a_result_in_vain_leaves_it_on_its_way(self, runtime: Runtime) -> None:
        with stopped(runtime):
            handle = _submit(runtime)
            with pytest.raises(TimeoutError, match=r"not complete after 0\.05 s"):
                handle.result(timeout=0.05)
            assert handle.finish_reason is None
        assert handle.result(LIMIT).finish_reason == "length"

    def test_several_threads_may_wait_for_one_result(self, runtime: Runtime) -> None:
        handle, found = _submit(runtime), list[object]()
        threads = [threading.Thread(target=lambda: found.append(handle.result())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert found == [handle.result()] * 4

    def test_cancel_returns_at_once(self, runtime: Runtime) -> None:
        with stopped(runtime) as stop:
            handle = _submit(runtime, LONG)
            assert stop.reached.wait(LIMIT)
            handle.cancel(), runtime.engine.cancel(handle)
            assert handle.finish_reason is None
        assert handle.result(LIMIT).finish_reason == "cancelled"
        assert runtime.kv_bytes_in_use == 0
        handle.cancel()

    def test_a_cancel_is_heard_between_two_layers_of_a_prompt(self, runtime: Runtime) -> None:
        with stopped(runtime, "begin_prefill") as stop:
            handle = _submit(runtime)
            assert stop.reached.wait(LIMIT)
            handle.cancel()
        assert handle.result(LIMIT).token_ids == ()
        assert runtime.kv_bytes_in_use == 0
        runtime.engine.call(lambda: runtime.debug.pool.check_integrity([]))

    @pytest.mark.parametrize("wait", ["events", "result"])
    def test_an_interrupt_cancels_what_is_waited_for(self, runtime: Runtime, wait: str) -> None:
        """Ctrl-C comes to the main thread; the engine and who else is on its way do not notice."""
        with stopped(runtime) as stop:
            other, handle = _submit(runtime), _submit(runtime, LONG)
            assert stop.reached.wait(LIMIT)
            timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                handle.result() if wait == "result" else list(handle.events())
        assert handle.result(LIMIT).finish_reason == "cancelled"
        assert other.result(LIMIT).finish_reason == "length"
        assert _submit(runtime).result(LIMIT).finish_reason == "length"

    def test_calls_come_between_two_steps(self, runtime: Runtime) -> None:
        handle = _submit(runtime, LONG)
        for event in zip(range(20), handle.events(), strict=False):
            assert event
            held = runtime.engine.call(
                lambda: (runtime.debug.pool.bytes_in_use, handle.cache.rows.lease.nbytes if handle.cache else 0)
            )
            assert held[0] == held[1]
        with pytest.raises(ZeroDivisionError):
            runtime.engine.call(lambda: 1 // 0)
        assert runtime.engine.call(lambda: runtime.engine.call(threading.current_thread)).name == "avl-edge engine"


class TestCoroutines:
    def test_events_and_results(self, runtime: Runtime) -> None:
        expected = list(runtime.generate([IMAGE], PROMPT, SHORT))

        async def ask() -> None:
            handles = [_submit(runtime) for _ in range(3)]

            async def events(handle: Handle) -> list[object]:
                return [event async for event in handle]

            assert await asyncio.gather(*map(events, handles)) == [expected] * 3
            assert (await handles[0]).token_ids == tuple(event.token_id for event in expected)
            assert len((await _submit(runtime)).token_ids) == 12

        asyncio.run(ask())

    def test_the_event_loop_goes_on_while_it_waits(self, runtime: Runtime) -> None:
        async def ask() -> int:
            ticks, done = 0, asyncio.ensure_future(asyncio.wait_for(_submit(runtime), LIMIT))
            while not done.done():
                ticks += 1
                await asyncio.sleep(0.01)
                if ticks == 10:
                    stop.go.set()
            assert (await done).finish_reason == "length"
            return ticks

        with stopped(runtime) as stop:
            assert asyncio.run(ask()) >= 10

    @pytest.mark.parametrize("wait", ["events", "result"])
    def test_a_cancelled_task_cancels_its_request(self, runtime: Runtime, wait: str) -> None:
        async def ask() -> Handle:
            handle = _submit(runtime, LONG)

            async def take() -> None:
                if wait == "result":
                    await handle
                async for _ in handle:
                    pass

            task = asyncio.create_task(take())
            while not stop.reached.is_set():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return handle

        with stopped(runtime) as stop:
            handle = asyncio.run(ask())
        assert handle.result(LIMIT).finish_reason == "cancelled"

    def test_an_event_loop_that_is_gone_harms_nobody(self, runtime: Runtime) -> None:
        loop = asyncio.new_event_loop()
        with stopped(runtime, "begin_prefill") as stop:
            handle = _submit(runtime)
            task = loop.create_task(_next(handle))
            loop.run_until_complete(asyncio.sleep(0.01))
            assert stop.reached.wait(LIMIT)
            loop.close()
        assert handle.result(LIMIT).finish_reason == "length"
        assert not task.done()


async def _next(handle: Handle) -> object:
    return await anext(handle)


class TestDeadlines:
    def test_who_is_late_ends_and_says_so(self, runtime: Runtime) -> None:
        """Its tokens until then are there; one who waits ends without any, and nobody else notices."""
        request = runtime.prepare([IMAGE], PROMPT, LONG)
        with stopped(runtime) as stop:
            late, other = runtime.submit(request, deadline=3.0), runtime.generate([IMAGE], PROMPT, SHORT)
            assert stop.reached.wait(LIMIT)
            waiting = runtime.submit(request, deadline=0.01)
            time.sleep(3.1)
        for each, has_tokens in ((late, True), (waiting, False)):
            with pytest.raises(DeadlineExceeded, match=r"the deadline passed after \d+ tokens of the answer: give"):
                each.result(LIMIT)
            assert each.finish_reason == "error"
            events = list[object]()
            with pytest.raises(DeadlineExceeded):
                events.extend(each)
            assert (len(events) > 0) == has_tokens
        assert other.result(LIMIT).finish_reason == "length"
        assert runtime.kv_bytes_in_use == 0
        in_time = runtime.submit(runtime.prepare([IMAGE], PROMPT, SHORT), deadline=LIMIT)
        assert in_time.result().finish_reason == "length"

    @pytest.mark.parametrize("given", [{"deadline": 0}, {"deadline": "soon"}, {"deadline": -1.0}, {"priority": 1.5}])
    def test_what_is_neither_is_refused(self, runtime: Runtime, given: dict[str, object]) -> None:
        with pytest.raises(BadInput, match=r"deadline is a number of seconds|priority is a whole number"):
            runtime.submit(runtime.prepare([IMAGE], PROMPT, SHORT), **given)  # type: ignore[arg-type]
