"""What ends a request before its time: errors, interrupts, dropped generators. Nobody else may notice."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from avl_edge import BadInput, Generation, Options, Runtime
from avl_edge.errors import StepFailed
from avl_edge.kv.layout import PAGE_ROWS, page_bytes
from avl_edge.kv.pool import RowPool
from tests.conftest import Checkpoints
from tests.equipment.broken_backend import before
from tests.equipment.checkpoints import random_image

IMAGE = random_image(3, (120, 80))
PROMPT = "Describe the picture in detail."
AVL = Options(method="avl", max_new_tokens=40)


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Runtime:
    return Runtime.load(checkpoint("mistral-gqa"), threaded=False)


def _ask(runtime: Runtime, options: Options = AVL) -> Generation:
    return runtime.generate([IMAGE], PROMPT, options)


def _check(runtime: Runtime, *alive: Generation) -> None:
    """The books are in order and hold nothing but the rows of ``alive``."""
    runtime.debug.pool.check_integrity([each.cache.rows for each in alive if each.cache])
    assert all(each.cache for each in alive)


def test_an_error_reaches_its_own_caller_and_nobody_else(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt of a second request fails while the first one is on its way."""
    expected = _ask(runtime).result().token_ids
    first = _ask(runtime)
    next(first)
    second = _ask(runtime)

    def fail() -> None:
        raise MemoryError("no room for rows")

    with monkeypatch.context() as patch:
        before(patch, runtime.debug.backend, "prompt", fail)
        next(first)
        with pytest.raises(StepFailed, match="MemoryError: no room for rows") as raised:
            next(second)
    assert isinstance(raised.value.__cause__, MemoryError)
    _check(runtime, first)
    assert first.result().token_ids == expected
    with pytest.raises(StepFailed, match="no room for rows"):
        second.result()
    assert runtime.kv_bytes_in_use == 0


def test_an_error_in_a_decode_step_ends_all_that_were_in_it(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [_ask(runtime), _ask(runtime)]
    for each in both:
        next(each), next(each)

    def fail() -> None:
        raise RuntimeError("broken step")

    with monkeypatch.context() as patch:
        before(patch, runtime.debug.backend, "decode", fail)
        for each in both:
            with pytest.raises(StepFailed, match="RuntimeError: broken step"):
                list(each)
    _check(runtime)
    assert runtime.kv_bytes_in_use == 0
    assert _ask(runtime).result().finish_reason == "length"


@pytest.mark.parametrize("calls", [1, 2, 3, 7, 12, 23])
def test_an_interrupt_between_two_lines_of_the_pool_loses_no_row(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Ctrl-C may fall where rows are taken but not yet written down: here at the n-th call that takes some."""
    left, allocate = calls, RowPool.allocate

    def interrupted(*arguments: Any) -> Any:
        nonlocal left
        ids = allocate(*arguments)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return ids

    generation = _ask(runtime)
    with monkeypatch.context() as patch:
        patch.setattr(RowPool, "allocate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generation.result()
    _check(runtime)
    assert runtime.kv_bytes_in_use == 0
    assert _ask(runtime).result().finish_reason == "length"


def test_real_interrupts_at_any_moment_lose_no_row(runtime: Runtime) -> None:
    """A timer interrupts thirty runs, each a little later than the one before."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGALRM, interrupt)
    expected = _ask(runtime).result().token_ids
    interrupted = 0
    try:
        for run in range(30):
            generation = _ask(runtime)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0013 * run)
                generation.result()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            generation.close()
            _check(runtime)
            assert runtime.kv_bytes_in_use == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert interrupted > 5
    assert _ask(runtime).result().token_ids == expected


def test_a_generation_collected_in_the_middle_of_a_step_ends_with_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may run anywhere, also while the step reads the rows of the one that it drops."""
    expected = _ask(runtime).result().token_ids
    kept, dropped = _ask(runtime), _ask(runtime)
    next(kept), next(dropped)
    cycle: list[object] = [dropped]
    cycle.append(cycle)
    del dropped, cycle
    with monkeypatch.context() as patch:
        before(patch, runtime.debug.backend, "decode", gc.collect)
        runtime.debug.engine.run_once()
    runtime.debug.engine.hear()
    _check(runtime, kept)
    assert kept.result().token_ids == expected
    assert runtime.kv_bytes_in_use == 0


def test_weights_are_loaded_once(runtime: Runtime) -> None:
    with pytest.raises(BadInput, match="loaded already"):
        runtime.load_weights()


def test_the_peak_is_what_was_held_not_what_was_promised(runtime: Runtime) -> None:
    layers, page = runtime.kv_shape.layers, page_bytes(runtime.kv_shape)
    generation = _ask(runtime, Options(max_new_tokens=60))
    for _ in range(3):
        next(generation)
    generation.close()
    kv = generation.result().kv
    # Three tokens were chosen, two of them were fed back.
    assert kv.bytes_peak == -(-(len(generation.prompt) + 2) * layers // PAGE_ROWS) * page
    promised = -(-(len(generation.prompt) + 59) * layers // PAGE_ROWS) * page
    assert generation.request.plan.peak_bytes == promised > kv.bytes_peak


def test_requests_run_together_in_one_step(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt after the other, in order; who has its first token gets another one between two layers of the other's
    prompt, and then every step serves both."""
    calls: list[tuple[str, int]] = []
    backend = runtime.debug.backend
    assert backend
    prefill, decode = backend.begin_prefill, backend.decode
    monkeypatch.setattr(backend, "begin_prefill", lambda *a: (calls.append(("prefill", len(a[0]))), prefill(*a))[1])
    monkeypatch.setattr(backend, "decode", lambda *a, **k: (calls.append(("decode", len(a[0]))), decode(*a, **k))[1])
    layers = max(runtime.spec.feature_layers) + runtime.spec.text.layers
    short = runtime.generate([], "How many?", Options(max_new_tokens=layers + 3))
    long = runtime.generate([IMAGE], PROMPT, Options(max_new_tokens=5))
    assert len(long.result().token_ids) == 5
    assert len(short.result().token_ids) == layers + 3
    prompts = [("prefill", len(short.prompt)), ("prefill", len(long.prompt))]
    assert [call for call in calls if call[0] == "prefill"] == prompts
    steps = [call for call in calls if call[0] == "decode"]
    assert steps == [*[("decode", 1)] * layers, *[("decode", 2)] * 2, *[("decode", 1)] * 2]


def test_what_waits_is_served_in_order(checkpoint: Checkpoints) -> None:
    directory = checkpoint("mistral-gqa")
    peak = Runtime.open(directory, threaded=False).prepare([IMAGE], PROMPT, AVL).plan.peak_bytes
    runtime = Runtime.load(directory, pool_bytes=peak, threaded=False)
    generations = [_ask(runtime) for _ in range(3)]
    ended: list[int] = []
    while runtime.debug.engine.run_once():
        ended += [i for i, each in enumerate(generations) if each.finish_reason and i not in ended]
    assert ended == [0, 1, 2]


def test_the_answer_ends_at_an_end_token(runtime: Runtime, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """The random models never say their end token, so generation_config.json declares another one beside it."""
    tokens = _ask(runtime).result().token_ids
    place = next(i for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    directory = shutil.copytree(checkpoint("mistral-gqa"), tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokens[place]]}))
    runtime = Runtime.load(directory, threaded=False)
    result = _ask(runtime).result()
    assert result.finish_reason == "stop"
    assert result.token_ids == tokens[: place + 1]
    assert runtime.kv_bytes_in_use == 0


def test_temperature_and_top_p_matter(runtime: Runtime) -> None:
    def tokens(**options: float) -> tuple[int, ...]:
        return _ask(runtime, Options(max_new_tokens=20, seed=1, **options)).result().token_ids  # type: ignore[arg-type]

    assert len({tokens(), tokens(temperature=0.7), tokens(temperature=3.0), tokens(temperature=3.0, top_p=0.5)}) == 4


def test_rows_add_up_and_the_fraction_is_exact(runtime: Runtime) -> None:
    generation = _ask(runtime, Options(method="avl", parameters={"refresh": 4}, max_new_tokens=30))
    assert next(generation) is not None
    read = full = 0
    layers = runtime.kv_shape.layers
    for step in range(1, 30):
        assert generation.cache is not None
        length = len(generation.prompt) + step
        refresh = step % 4 == 0
        # A step reads the rows that are there before it, and the new token's own.
        for layer in generation.cache.rows:
            image = len(layer.image_ids) if refresh else int(layer.core.sum())
            read += len(layer.text_ids) + image + 1
        full += length * layers
        next(generation)
    kv = generation.result().kv
    assert kv.rows_read_fraction == kv.bytes_read_fraction == read / full
    assert kv.refreshes == 7
    for layer in kv.layers:
        assert layer["text"] + layer["core"] + layer["secondary"] + layer["freed"] == len(generation.prompt) + 29


def test_timings_are_those_of_a_clock(runtime: Runtime) -> None:
    start = time.perf_counter()
    timings = _ask(runtime).result().timings
    seconds = time.perf_counter() - start
    assert 0 < timings.encode_ms + timings.prefill_ms <= timings.ttft_ms < 1000 * seconds
    assert timings.ttft_ms + 39 * timings.decode_ms_per_token <= 1000 * seconds
    assert timings.tokens_per_s == pytest.approx(1000 / timings.decode_ms_per_token)
