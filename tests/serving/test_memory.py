"""What requests hold beside their rows: pixels for as long as they are needed, activations within their entry; and a
process whose memory is bounded as a whole."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import numpy as np
import pytest

from avl_edge import BadInput, Busy, Generation, Options, Runtime, TooLarge
from avl_edge.config import PromptShape
from avl_edge.errors import DeadlineExceeded, StepFailed
from avl_edge.machine import allocator
from avl_edge.machine.ledger import MemoryStats
from tests.conftest import Checkpoints
from tests.equipment.broken_backend import before
from tests.equipment.checkpoints import SPECS, random_image

IMAGES = [random_image(seed, (90, 60)) for seed in range(3)]
PROMPT = "What is shown in the picture?"
OPTIONS = Options(max_new_tokens=8)
PICTURE = 3 * SPECS["mistral-gqa"].image_size ** 2 * np.dtype(np.float32).itemsize
"""Bytes of one picture's pixels."""
MB = 10**6


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Runtime:
    return Runtime.load(checkpoint("mistral-gqa"), threaded=False)


@pytest.fixture
def process_bytes(monkeypatch: pytest.MonkeyPatch) -> int:
    """Other tests leave memory behind: what this process held before a runtime is what is said here."""
    monkeypatch.setattr(allocator, "resident_bytes", lambda: 300 * MB)
    return 300 * MB


def _submitted(runtime: Runtime, **more: Any) -> tuple[Generation, weakref.ref[Any]]:
    request = runtime.prepare([IMAGES[0]], PROMPT, OPTIONS)
    return runtime.submit(request, **more), weakref.ref(request.prompt.pixel_values)


def _pixels(runtime: Runtime) -> int:
    return runtime.memory().entries["pixels"].used


def test_pixels_go_once_they_are_encoded(runtime: Runtime) -> None:
    generation, pixels = _submitted(runtime)
    assert pixels() is not None
    assert _pixels(runtime) == PICTURE
    next(generation)
    assert pixels() is None, "and not with the answer's end"
    assert _pixels(runtime) == 0
    assert generation.prompt.pixel_values is None
    assert len(generation.result().token_ids) == 8


def test_pixels_of_pictures_that_were_encoded_before_go_too(runtime: Runtime) -> None:
    _submitted(runtime)[0].result()
    generation, pixels = _submitted(runtime)
    next(generation)
    assert pixels() is None


def _fail(generation: Generation) -> None:
    with pytest.raises((StepFailed, DeadlineExceeded)):
        generation.result()


@pytest.mark.parametrize("closed", ["the request", "the runtime"])
def test_pixels_of_requests_that_never_ran_go_with_them(runtime: Runtime, closed: str) -> None:
    """Their handles are kept, as by somebody who has not looked yet."""
    first, (second, pixels) = _submitted(runtime)[0], _submitted(runtime)
    next(first)
    (second if closed == "the request" else runtime).close()
    assert second.finish_reason == "cancelled"
    assert pixels() is None


@pytest.mark.parametrize("stage", ["begin_encode", "begin_prefill"])
def test_pixels_of_requests_that_failed_go_with_them(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(runtime.debug.backend, stage, fails)
    generation, pixels = _submitted(runtime)
    _fail(generation)
    assert pixels() is None
    assert runtime.memory().entries["activations"].used == 0


def test_pixels_go_with_the_deadline(checkpoint: Checkpoints) -> None:
    with Runtime.load(checkpoint("mistral-gqa")) as runtime:
        generation, pixels = _submitted(runtime, deadline=1e-6)
        _fail(generation)
        assert pixels() is None


def test_a_request_may_be_submitted_twice(runtime: Runtime) -> None:
    request = runtime.prepare([IMAGES[0]], PROMPT, OPTIONS)
    first = runtime.submit(request).result()
    assert _pixels(runtime) == PICTURE, "whoever prepared it has them still"
    runtime.debug.features.forget()  # type: ignore[union-attr]
    assert runtime.submit(request).result().token_ids == first.token_ids


def test_an_image_session_has_pixels_until_its_rows_are_there(runtime: Runtime) -> None:
    session = runtime.open_images(IMAGES[:2], OPTIONS)
    assert _pixels(runtime) == 2 * PICTURE
    early, questions = session.prepare(PROMPT), [session.ask(PROMPT) for _ in range(3)]
    assert _pixels(runtime) == 2 * PICTURE, "questions share them"
    while not questions[0].cache:
        runtime.engine.run_once()
    next(questions[0])
    asked = session.prepare(PROMPT)
    assert asked.prompt.pixel_values is None
    late = runtime.submit(early)
    assert early.prompt.pixel_values is not None
    del early
    assert _pixels(runtime) == 0, "whoever else waits, and though one was prepared when there were some"
    answers = [late.result(), runtime.submit(asked).result(), *(question.result() for question in questions)]
    assert len({answer.token_ids for answer in answers}) == 1


def test_an_image_session_keeps_pixels_while_nobody_could_run_them(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = runtime.open_images([IMAGES[0]], OPTIONS)
    with monkeypatch.context() as patch:

        def fail() -> None:
            raise RuntimeError("broken")

        before(patch, runtime.debug.backend, "prefix", fail)
        first, second = session.ask(PROMPT), session.ask(PROMPT)
        for question in (first, second):
            _fail(question)
    assert _pixels(runtime) == PICTURE
    assert session.ask(PROMPT).result().token_ids == runtime.generate([IMAGES[0]], PROMPT, OPTIONS).result().token_ids
    assert _pixels(runtime) == 0


@pytest.mark.parametrize("asked", [False, True])
def test_a_closed_image_session_has_no_pixels(runtime: Runtime, asked: bool) -> None:
    session = runtime.open_images([IMAGES[0]], OPTIONS)
    question = session.ask(PROMPT) if asked else None
    session.close()
    assert _pixels(runtime) == PICTURE * asked
    if question:
        assert len(question.result().token_ids) == 8
    assert _pixels(runtime) == 0


def test_who_fills_the_queue_with_pixels_is_told_to_wait(runtime: Runtime) -> None:
    """And before any picture is decoded; it takes each alone and all in one for a moment."""
    runtime.debug.ledger["pixels"].limit = 5 * PICTURE
    generations = [_submitted(runtime)[0] for _ in range(4)]
    with pytest.raises(Busy, match="there is no room now for the pixels of one picture"):
        runtime.prepare([b"not even looked at"], PROMPT, OPTIONS)
    with pytest.raises(Busy):
        runtime.open_images([IMAGES[0]])
    with pytest.raises(TooLarge, match="there is no room for the pixels of 3 pictures"):
        runtime.prepare(IMAGES, PROMPT, OPTIONS)
    assert runtime.generate([], PROMPT, OPTIONS).result()
    generations[0].close()
    assert runtime.generate([IMAGES[0]], PROMPT, OPTIONS).result()
    with pytest.raises(BadInput, match="not a picture"):
        runtime.prepare([b"not a picture"], PROMPT, OPTIONS)
    del generations
    gc.collect()
    assert runtime.generate([], PROMPT, OPTIONS).result()
    assert _pixels(runtime) == 0, "also of what was refused"


def test_prompts_run_within_the_memory_for_them(runtime: Runtime) -> None:
    """An urgent one waits for one that is half-way where both are too much; and a larger one is refused."""
    activations = runtime.debug.ledger["activations"]
    request = runtime.prepare([IMAGES[0]], PROMPT, OPTIONS)
    one, step = request.workspace.prompt_bytes, request.workspace.step_bytes
    activations.limit = one + step
    calm = runtime.submit(request)
    while calm.cache is None:
        runtime.engine.run_once()
    assert activations.used == one
    urgent = runtime.submit(request, priority=5)
    while urgent.cache is None:
        assert runtime.engine.run_once()
        assert activations.used in (one, step, one + step)
    assert calm.result().token_ids == urgent.result().token_ids
    assert activations.peak == one + step
    assert activations.used == 0
    activations.limit = one - 1
    for ask in (lambda: runtime.submit(request), lambda: runtime.prepare([IMAGES[0]], PROMPT, OPTIONS)):
        with pytest.raises(TooLarge, match="there is no room for the prompt"):
            ask()


def test_what_does_not_fit_now_is_told_from_what_never_fits(checkpoint: Checkpoints) -> None:
    directory = checkpoint("mistral-gqa")
    planned = Runtime.open(directory, threaded=False).open_images([IMAGES[0]])
    runtime = Runtime.load(directory, pool_bytes=planned.peak_bytes, threaded=False)
    session = runtime.open_images([IMAGES[0]])
    session.load()
    with pytest.raises(Busy, match="open image sessions hold the rows"):
        runtime.open_images([IMAGES[1]]).load()
    with pytest.raises(TooLarge, match="the whole pool has"):
        runtime.generate(IMAGES, PROMPT, OPTIONS)


def _least(refusal: pytest.ExceptionInfo[TooLarge]) -> int:
    found = re.search(r"the smallest that would do is .*?\((\d+) bytes\)", str(refusal.value))
    assert found, refusal.value
    return int(found[1])


def _sum(stats: MemoryStats) -> int:
    return sum(entry.limit or 0 for entry in stats.entries.values())


@pytest.mark.usefixtures("process_bytes")
def test_a_process_that_is_too_small_is_refused_before_anything_is_loaded(checkpoint: Checkpoints) -> None:
    directory = checkpoint("mistral-gqa")
    with pytest.raises(TooLarge, match="does not hold the model") as refusal:
        Runtime.open(directory, max_memory="10MB")
    runtime = Runtime.open(directory, max_memory=_least(refusal), threaded=False)
    with pytest.raises(TooLarge) as refusal:
        runtime.prepare([IMAGES[0]], PROMPT, OPTIONS)
    least = _least(refusal)
    with pytest.raises(TooLarge, match="prompt tokens and 8 new ones: the smallest that would do"):
        runtime.prepare([IMAGES[0]], PROMPT, Options(kv_budget="1GB", max_new_tokens=8))
    with pytest.raises(TooLarge):
        Runtime.open(directory, max_memory=least - 1, threaded=False).prepare([IMAGES[0]], PROMPT, OPTIONS)
    runtime = Runtime.open(directory, max_memory=least, threaded=False)
    request = runtime.prepare([IMAGES[0]], PROMPT, OPTIONS)
    assert not request.plan.formats.all_exact, "without a budget, rows are packed into what is left"
    runtime.load_weights(pool_bytes=request.plan.peak_bytes)
    assert len(runtime.submit(request).result().token_ids) == 8
    stats = runtime.memory()
    assert _sum(stats) <= least
    assert stats.used <= least
    for entry in stats.entries.values():
        assert entry.limit is not None
        assert entry.used <= entry.peak <= entry.limit


def test_the_pool_gets_what_the_longest_prompt_leaves(checkpoint: Checkpoints, process_bytes: int) -> None:
    directory, limit = checkpoint("mistral-gqa"), process_bytes + 400 * MB
    runtime = Runtime.load(directory, max_memory=limit, threaded=False)
    stats, planner = runtime.memory().entries, runtime.planner
    assert stats["process"].used == process_bytes
    assert stats["weights"].used >= (directory / "model.safetensors").stat().st_size
    assert stats["kv_pool"].used == runtime.debug.rows.store.nbytes  # type: ignore[union-attr]
    longest = planner.workspace(PromptShape(1, 0, planner.spec.text.context - 1), 0).prompt_bytes
    assert stats["activations"].limit is not None
    assert stats["activations"].limit - stats["activations"].used >= longest
    page = runtime.debug.pool.page_bytes
    assert limit - page < _sum(runtime.memory()) + 16 + page
    words = "boat " * (planner.spec.text.context // 4)
    assert runtime.generate([IMAGES[0]], words, Options(max_new_tokens=4)).result()
    given = Runtime.load(directory, max_memory=limit, pool_bytes=10 * MB, threaded=False)
    assert given.memory().entries["kv_pool"].used <= 10 * MB
    with pytest.raises(TooLarge, match=r"a pool of .* smallest that would do"):
        Runtime.load(directory, max_memory=limit, pool_bytes=400 * MB)


def test_a_picture_is_decoded_within_its_memory(checkpoint: Checkpoints, process_bytes: int) -> None:
    runtime = Runtime.open(checkpoint("mistral-gqa"), max_memory=process_bytes + 200 * MB, threaded=False)
    side = int(runtime.max_pixels**0.5)
    assert runtime.prepare([random_image(1, side)], PROMPT, OPTIONS)
    with pytest.raises(BadInput, match="megapixels, for which the process has memory; scale it down"):
        runtime.prepare([random_image(1, side + 1)], PROMPT, OPTIONS)
    decoding = runtime.memory().entries["decoding"]
    assert (decoding.used, decoding.peak) == (0, decoding.limit)


@pytest.mark.parametrize("size", ["lots", 0, -5, 1.5, True])
def test_a_bound_that_is_no_size_is_refused(checkpoint: Checkpoints, size: Any) -> None:
    with pytest.raises(BadInput, match=r"max_memory|cannot read"):
        Runtime.open(checkpoint("mistral-gqa"), max_memory=size)


def test_closing_lets_go_of_everything_that_was_loaded(runtime: Runtime) -> None:
    _submitted(runtime)[0].result()
    held = runtime.memory().entries
    assert held["features"].used > 0
    runtime.close()
    after = {name: entry.used for name, entry in runtime.memory().entries.items() if entry.used}
    assert set(after) == {"process", "libraries"}
