"""What fails for one request, for all of a step, or in the loop itself: each hears of its own, and the rest goes on."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from avl_edge import BadInput, Generation, Options, Runtime
from avl_edge.backends.step_batch import StepResult
from avl_edge.errors import InvalidLogits, StepFailed
from avl_edge.kv.cache import SequenceCache
from avl_edge.model.sampling import Sampler
from avl_edge.serving.failure import Failure
from avl_edge.serving.schedule_policy import FirstComeFirstServed
from tests.conftest import Checkpoints
from tests.equipment.broken_backend import STAGES, before
from tests.equipment.checkpoints import random_image
from tests.equipment.prompts_first import STEPPED
from tests.equipment.slow_backend import LIMIT, stopped

IMAGE, PROMPT = random_image(3, (120, 80)), "Describe the picture in detail."
AVL = Options(method="avl", max_new_tokens=12)
SAMPLED = Options(max_new_tokens=12, temperature=1.0, seed=5)


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Iterator[Runtime]:
    with Runtime.load(checkpoint("mistral-gqa")) as runtime:
        yield runtime


def _ask(runtime: Runtime, options: Options = AVL) -> Generation:
    return runtime.generate([IMAGE], PROMPT, options)


def _is_empty(runtime: Runtime) -> bool:
    runtime.engine.call(lambda: runtime.debug.pool.check_integrity([]))
    return runtime.kv_bytes_in_use == 0 and runtime.debug.pool.pages_unreserved == runtime.debug.pool.pages


@contextmanager
def _together(runtime: Runtime, options: Sequence[Options]) -> Iterator[list[Generation]]:
    """Requests that wait for the engine, which stands still until the block ends."""
    with stopped(runtime) as stop:
        first = _ask(runtime)
        assert stop.reached.wait(LIMIT)
        yield [_ask(runtime, each) for each in options]
    first.close()


def test_a_sampler_that_raises_ends_its_own_request(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are no numbers, of one request in a batch of three."""
    expected = _ask(runtime, SAMPLED).result().token_ids
    backend: Any = runtime.debug.backend
    decode, broken = backend.decode, list[Generation]()

    def with_nan(token_ids: Sequence[int], caches: Sequence[SequenceCache], **named: Any) -> StepResult:
        result = decode(token_ids, caches, **named)
        logits = result.logits.clone()
        for number, cache in enumerate(caches):
            if broken and cache is broken[0].cache and cache.step > 3:
                logits[number] = torch.nan
        return StepResult(logits=logits)

    monkeypatch.setattr(backend, "decode", with_nan)
    with _together(runtime, [SAMPLED] * 3) as generations:
        broken.append(generations[1])
    with pytest.raises(InvalidLogits, match="the model gave NaN"):
        generations[1].result(LIMIT)
    assert 3 < len(list(_until_error(generations[1]))) < 12, "the tokens until then are there"
    assert [generations[number].result(LIMIT).token_ids for number in (0, 2)] == [expected] * 2
    assert _is_empty(runtime)


def _said(generation: Generation) -> str:
    """The error that a request ends with, as it is printed; nothing where it has an answer."""
    try:
        generation.result(LIMIT)
    except StepFailed as error:
        return "".join(traceback.format_exception(error))
    return ""


def _until_error(generation: Generation) -> Iterator[object]:
    try:
        yield from generation
    except (InvalidLogits, StepFailed):
        return


@pytest.mark.parametrize("name", ["text", "policy", "stop", "prompt"])
def test_what_is_asked_for_one_request_ends_it_alone(checkpoint: Checkpoints, name: str) -> None:
    """Its text, its policy in a step and in its prompt, and the matching of its end."""
    runtime = Runtime.load(checkpoint("mistral-gqa"), **STEPPED)
    expected = _ask(runtime).result().token_ids
    generations = [_ask(runtime) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        if name == "prompt":
            _fail(patch, SequenceCache, "store_prompt", lambda cache, *_: cache is generations[1].cache)
        for each in generations[:1] if name == "prompt" else generations:
            next(each)
        sequence = runtime.debug.scheduler.decoding[min(1, len(runtime.debug.scheduler.decoding) - 1)]
        if name == "text":
            _fail(patch, sequence.text_stream, "push", lambda *_: True)
        elif name == "policy":
            _fail(patch, sequence.admitted_cache, "settle", lambda *_: True)
        elif name == "stop":
            _fail(patch, type(sequence), "push", lambda own, *_: own is sequence)
        with pytest.raises(StepFailed, match="ValueError: broken"):
            generations[1].result()
        alive = [generations[number].cache for number in (0, 2)]
        runtime.debug.pool.check_integrity(cache.rows for cache in alive if cache)
        assert [generations[number].result().token_ids for number in (0, 2)] == [expected] * 2
    assert _is_empty(runtime)


def _fail(patch: pytest.MonkeyPatch, of: Any, name: str, where: Any) -> None:
    function = getattr(of, name)

    def fails(*arguments: Any, **named: Any) -> Any:
        if where(*arguments):
            raise ValueError("broken")
        return function(*arguments, **named)

    patch.setattr(of, name, fails)


def test_a_step_that_fails_gives_each_an_error_of_its_own(runtime: Runtime) -> None:
    """That says the same however often it is raised."""

    def fail() -> None:
        raise RuntimeError("the device is gone")

    with pytest.MonkeyPatch.context() as patch:
        before(patch, runtime.debug.backend, "decode", fail)
        with _together(runtime, [AVL] * 3) as generations:
            pass
        errors, lines = list[BaseException](), set[int]()
        for generation in generations * 3:
            with pytest.raises(StepFailed, match="RuntimeError: the device is gone") as raised:
                generation.result(LIMIT)
            errors.append(raised.value)
            lines.add(len(traceback.format_exception(raised.value)))
    assert len({id(error) for error in errors}) == len(errors)
    assert len(lines) == 1, "the trace has grown"
    assert _is_empty(runtime)


@pytest.mark.parametrize("stage", [*STAGES, "encode"])
def test_a_request_that_failed_leaves_no_circle(runtime: Runtime, stage: str) -> None:
    """What it held goes when its caller lets go of it, without the collector."""

    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.MonkeyPatch.context() as patch:
        if stage == "encode":
            _fail(patch, runtime.debug.backend, "begin_encode", lambda *_: True)
        else:
            before(patch, runtime.debug.backend, stage, fail)
        session = runtime.open_images([IMAGE]) if stage == "prefix" else None
        gc.collect()
        gc.disable()
        try:
            generation = session.ask(PROMPT) if session else _ask(runtime)
            held = [weakref.ref(generation), weakref.ref(generation.request.prompt), weakref.ref(generation.handle)]
            assert "Error: broken" in _said(generation), "with the lines of its cause"
            if session is None:
                del generation
                runtime.engine.call(lambda: None)
                assert [each() for each in held] == [None] * 3
        finally:
            gc.enable()
    assert _is_empty(runtime)


def test_an_error_keeps_its_lines_and_not_what_they_held() -> None:
    def computes(rows: Tensor) -> None:
        try:
            raise KeyError(len(rows))
        except KeyError:
            raise ValueError("broken") from None

    rows = torch.zeros(3)
    held = weakref.ref(rows)
    try:
        computes(rows)
    except ValueError as error:
        failure = Failure(error)
    del rows
    assert held() is None
    lines = "".join(traceback.format_exception(failure.exception()))
    assert "StepFailed: the request ended with a step that failed: ValueError: broken" in lines
    assert "in computes" in lines
    own = BadInput("give another")
    assert str(Failure(own).exception()) == "give another"
    assert type(Failure(own).exception()) is BadInput
    assert Failure(own).exception() is not own


def test_what_the_caller_is_handling_is_left_alone() -> None:
    """An error that came while another one was handled holds that one, whose trace is not this error's to empty."""

    def computes() -> None:
        raise ValueError("broken")

    def handles(kept: str) -> str:
        try:
            raise KeyError(kept)
        except KeyError as outer:
            trace = outer.__traceback__
            try:
                computes()
            except ValueError as error:
                Failure(error)
            return kept if outer.__traceback__ is trace else ""

    assert handles("here") == "here"


class TestTheLoop:
    def test_a_schedule_that_raises_ends_all_and_the_loop_goes_on(self, checkpoint: Checkpoints) -> None:
        class Broken(FirstComeFirstServed):
            breaks = False

            def choose(self, *arguments: Any) -> Any:
                if self.breaks:
                    raise ValueError("no choice")
                return super().choose(*arguments)

        schedule = Broken()
        runtime = Runtime.load(checkpoint("mistral-gqa"), schedule=schedule)
        with _together(runtime, [AVL] * 2) as generations:
            schedule.breaks = True
        for generation in generations:
            with pytest.raises(StepFailed, match="ValueError: no choice"):
                generation.result(LIMIT)
        schedule.breaks = False
        assert _is_empty(runtime)
        assert _ask(runtime).result(LIMIT).finish_reason == "length"
        runtime.close()

    def test_interrupts_of_its_thread_at_any_moment(self, runtime: Runtime) -> None:
        """As a debugger or a watchdog raises them there. Requests end, with answers or errors; no row is lost."""
        (thread,) = (each for each in threading.enumerate() if each.name == "avl-edge engine")
        ends = set()
        for run in range(30):
            generations = [_ask(runtime) for _ in range(2)]
            time.sleep(0.001 * run)
            raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
            )
            assert raised == 1
            for generation in generations:
                said = _said(generation)
                assert not said or "Interrupt" in said or "interrupted" in said
                ends.add(generation.finish_reason)
            assert thread.is_alive()
            runtime.engine.call(lambda: runtime.debug.pool.check_integrity([]))
        assert {"length", "error"} <= ends
        assert _is_empty(runtime)

    def test_a_closed_session_is_said_to_who_asks(self, runtime: Runtime) -> None:
        """Also where it closes between the question and the engine's hearing it."""
        session = runtime.open_images([IMAGE])
        request = session.prepare(PROMPT)
        with _together(runtime, []):
            question = runtime.submit(request)
            request.prefix.is_closed = True  # type: ignore[union-attr]
        with pytest.raises(BadInput, match="the session is closed"):
            question.result(LIMIT)


def test_samplers_belong_to_one_request(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first token that cannot be sampled ends its request after its prompt, whose rows go."""
    _fail(monkeypatch, Sampler, "__call__", lambda *_: True)
    with pytest.raises(StepFailed, match="broken"):
        _ask(runtime).result(LIMIT)
    assert _is_empty(runtime)
