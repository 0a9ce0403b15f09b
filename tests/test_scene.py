"""Several questions about one picture: the answers are those of plain requests, the picture is run and held once."""

from __future__ import annotations

import gc
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
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
from transformers import LlavaForConditionalGeneration

from avl_edge import BadInput, DoesNotFit, Formats, Generation, Options, Runtime, Scene
from avl_edge.cli import run_app
from avl_edge.layout import page_bytes
from avl_edge.pool import BorrowingRows, SequenceRows
from avl_edge.pressure import Limits, Monitor
from avl_edge.scene import PACKED
from tests import oracle, oracle_scene
from tests.checkpoints import SPECS, random_image
from tests.conftest import Checkpoints
from tests.cuda_on_cpu import HostDevice
from tests.oracle import AvlSettings, OracleStep
from tests.oracle_formats import TierFormats
from tests.oracle_scene import SceneOracle
from tests.test_avl import _rows
from tests.test_pressure import GB, write

IMAGES = [random_image(1, (70, 90)), random_image(2, (200, 64))]
FIRST, SECOND = "What is shown in this picture?", "How many boats are there, and what colour is the car?"
WHOLE = {"secondary": 100, "prefill_keep": 100}
FULL = Options(max_new_tokens=24)
AVL = Options(method="avl", parameters={**WHOLE, "core": 30, "text_floor": 4, "text_keep": 60}, max_new_tokens=24)
COARSE = Options(method="coarse", parameters={"core": 30, "mass": 80}, max_new_tokens=24)
PROMPT_MEAN = Options(method="avl", parameters={**WHOLE, "core": 20, "prompt_mean": 1, "refresh": 2}, max_new_tokens=24)


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Runtime:
    return Runtime.load(checkpoint("mistral-gqa"))


def _record(runtime: Runtime) -> list[Tensor]:
    """The logits of every step to come of the one question that runs."""
    backend: Any = runtime._backend
    prefill, decode, logits = backend.prefill, backend.decode, []

    def note(found: Tensor) -> Tensor:
        logits.append(found.reshape(-1, found.shape[-1])[0])
        return found

    backend.prefill = lambda *arguments: note(prefill(*arguments))
    backend.decode = lambda *arguments: note(decode(*arguments))
    return logits


def _check(runtime: Runtime, *questions: Generation) -> None:
    """The books are in order, and hold nothing but the rows of ``questions`` and of scenes."""
    caches = [each.cache for each in questions if each.cache]
    assert len(caches) == len(questions)
    scenes = [look.cache for look in runtime._scheduler._looks if look.cache]
    runtime._pool.check_integrity([cache.rows for cache in (*caches, *scenes)])
    assert runtime.kv_bytes_in_use == sum(cache.rows.lease.nbytes for cache in (*caches, *scenes))


def _is_empty(runtime: Runtime) -> bool:
    return runtime.kv_bytes_in_use == 0 and runtime._pool.pages_unreserved == runtime._pool.pages


# Answers


@pytest.mark.parametrize(
    ("name", "images"), [(n, 1 + i % 2) for i, n in enumerate(SPECS) if SPECS[n].dtype == torch.float32]
)
def test_full_attention_equals_transformers(checkpoint: Checkpoints, name: str, images: int) -> None:
    """Both of two questions, the second about a picture that was run for the first."""
    runtime = Runtime.load(checkpoint(name))
    logits = _record(runtime)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint(name)).eval()
    with runtime.look(IMAGES[:images], FULL) as scene:
        for prompt in (FIRST, SECOND):
            logits.clear()
            question = scene.ask(prompt)
            tokens = list(question.result().token_ids)
            ids, pixels = torch.tensor([question.prompt.token_ids]), torch.tensor(question.prompt.pixel_values)
            with torch.no_grad():
                expected = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=24, do_sample=False)
                whole = torch.cat([ids, torch.tensor([tokens])], 1)
                truth = model(input_ids=whole, pixel_values=pixels).logits[0, ids.shape[1] - 1 : -1]
            assert tokens == expected[0, ids.shape[1] :].tolist()
            assert (torch.stack(logits) - truth).abs().max() <= 2e-4
    assert _is_empty(runtime)


def test_bfloat16_is_as_close_to_float64_as_a_plain_request(checkpoint: Checkpoints) -> None:
    directory = checkpoint("llama-bf16")
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float64).eval()
    errors = []
    for shared in (False, True):
        runtime = Runtime.load(directory)
        logits = _record(runtime)
        scene = runtime.look(IMAGES, FULL)
        question = scene.ask(SECOND) if shared else runtime.generate(IMAGES, SECOND, FULL)
        tokens, prompt = list(question.result().token_ids), question.prompt
        ids = torch.tensor([[*prompt.token_ids, *tokens]])
        with torch.no_grad():
            exact = model(input_ids=ids, pixel_values=torch.tensor(prompt.pixel_values).double()).logits
        errors.append((torch.stack(logits) - exact[0, len(prompt) - 1 : -1]).square().mean().sqrt())
    assert errors[1] <= 1.25 * errors[0]


@pytest.mark.parametrize("options", [FULL, AVL, COARSE, PROMPT_MEAN], ids=["full", "avl", "coarse", "prompt_mean"])
@pytest.mark.parametrize(("name", "images"), [("llama-mha", 1), ("qwen2-gqa", 2), ("mistral-wide", 2)])
def test_a_question_is_answered_as_by_a_plain_request(
    checkpoint: Checkpoints, name: str, images: int, options: Options
) -> None:
    """The same tokens, the same rows in every tier of every layer after each step, the same rows read."""
    runtime = Runtime.load(checkpoint(name, dtype=torch.float64))
    with runtime.look(IMAGES[:images], options) as scene:
        scene.ask(FIRST).result()
        question, plain = scene.ask(SECOND), runtime.generate(IMAGES[:images], SECOND, options)
        for expected in plain:
            event = next(question)
            assert event == expected
            if event.finish_reason is None:
                assert _rows(question.cache) == _rows(plain.cache)
                assert [rows.freed for rows in question.cache.rows] == [rows.freed for rows in plain.cache.rows]
        ours, theirs = question.result(), plain.result()
    for name in ("bytes_full", "rows_read_fraction", "bytes_read_fraction", "refreshes", "layers"):
        assert getattr(ours.kv, name) == getattr(theirs.kv, name)
    assert (ours.text, ours.settings, ours.usage) == (theirs.text, theirs.settings, theirs.usage)


@pytest.mark.parametrize(
    ("name", "images", "parameters"),
    [
        ("llama-mha", 1, {"core": 30, "text_keep": 50, "text_floor": 4}),
        ("qwen2-gqa", 2, {"core": 12, "refresh": 2, "text_keep": 40, "text_floor": 3}),
        ("llama-bias", 2, {"core": 45, "refresh": 1, "prompt_mean": 1, "text_keep": 70, "text_floor": 4}),
        ("mistral-wide", 1, {"core": 8, "refresh": 0, "prompt_mean": 1}),
    ],
)
def test_avl_equals_the_oracle(checkpoint: Checkpoints, name: str, images: int, parameters: dict[str, int]) -> None:
    """A-VL's own definition, over a prompt that was run at once, text between two images included."""
    directory = checkpoint(name, dtype=torch.float64)
    settings = {**WHOLE, **parameters}
    runtime = Runtime.load(directory)
    scene = runtime.look(IMAGES[:images])
    scene.load()
    question = scene.ask(SECOND, Options(method="avl", parameters=settings, max_new_tokens=32))
    ids, pixels = torch.tensor([question.prompt.token_ids]), torch.tensor(question.prompt.pixel_values)
    expected = oracle.generate(oracle.load_model(directory), ids, pixels, AvlSettings(**settings), 32)
    _compare(question, expected)


def _compare(question: Generation, expected: list[OracleStep]) -> None:
    for step, truth in enumerate(expected):
        event = next(question)
        assert event.token_id == truth.token, f"step {step}"
        if event.finish_reason is None:
            assert _rows(question.cache) == truth.rows, f"step {step}"


@pytest.mark.parametrize(
    ("name", "images", "tiers"),
    [
        ("llama-mha", 1, TierFormats("int8", "int8", "int8")),
        ("qwen2-gqa", 2, TierFormats("exact", "int4", "int4")),
        ("mistral-wide", 2, TierFormats("int4", "int8", "int8")),
        ("llama-bias", 1, TierFormats("int8", "exact", "exact")),
    ],
)
@pytest.mark.parametrize("method", ["full", "avl", "coarse"])
def test_packed_rows_equal_the_oracle(
    checkpoint: Checkpoints, name: str, images: int, tiers: TierFormats, method: str
) -> None:
    """The question attends the picture's rows as they are read back; logits, tokens and rows."""
    directory, steps = checkpoint(name, dtype=torch.float64), 16
    runtime = Runtime.load(directory)
    logits = _record(runtime)
    scene = runtime.look(IMAGES[:images], Options(formats=Formats(tiers.text, tiers.core, tiers.secondary)))
    prompt = scene.prepare(SECOND).prompt
    pixels = torch.tensor(prompt.pixel_values)
    truth = SceneOracle(oracle_scene.load_model(directory), list(prompt.token_ids), pixels, tiers)
    parameters: dict[str, int] = {}
    if method == "coarse":
        parameters = {"core": 40, "mass": 70}
        expected = truth.coarse(100, 40, 70, steps)
    elif method == "avl":
        parameters = {**WHOLE, "core": 25, "refresh": 2, "text_keep": 60, "text_floor": 4}
        expected = truth.avl(AvlSettings(**parameters), steps)
    else:
        expected = truth.avl(AvlSettings(100, 100, 100, refresh=0, text_keep=100), steps)
    _compare(scene.ask(SECOND, Options(method, parameters, max_new_tokens=steps)), expected)
    torch.testing.assert_close(torch.stack(logits), torch.stack([step.logits for step in expected]), rtol=0, atol=5e-5)


def test_packing_is_noticed_before_the_question(checkpoint: Checkpoints) -> None:
    """A plain request attends its own picture exactly, so that equality above means something."""
    runtime = Runtime.load(checkpoint("llama-mha", dtype=torch.float64))
    logits = _record(runtime)
    options = Options(formats=Formats("exact", "int4", "int4"), max_new_tokens=1)
    runtime.generate(IMAGES, SECOND, options).result()
    runtime.look(IMAGES, options).ask(SECOND).result()
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_questions_at_once_are_answered_as_each_alone(runtime: Runtime) -> None:
    asks = [(FIRST, FULL), (SECOND, AVL), (FIRST, COARSE), (SECOND, PROMPT_MEAN)]
    with runtime.look(IMAGES[:1]) as scene:
        alone = [scene.ask(*ask).result() for ask in asks]
        together, plain = [scene.ask(*ask) for ask in asks], runtime.generate(IMAGES[1:], FIRST, FULL)
        for generation in (*together, plain):
            next(generation)
        assert len(runtime._scheduler.running) == 5, "in one batch"
        assert len(set(map(_core, together))) > 2, "each has a core of its own"
        _check(runtime, *together, plain)
        results = [generation.result() for generation in together]
    for result, expected in zip(results, alone, strict=True):
        assert (result.token_ids, result.text, result.kv) == (expected.token_ids, expected.text, expected.kv)
    plain.close()
    assert _is_empty(runtime)


def _core(generation: Generation) -> tuple[int, ...]:
    assert generation.cache is not None
    rows = generation.cache.rows.layers[-1]
    return tuple(rows.image_positions[rows.core].tolist())


def test_threads_may_ask_about_one_scene(runtime: Runtime) -> None:
    expected = runtime.generate(IMAGES[:1], SECOND, AVL).result().token_ids
    results: list[tuple[int, ...]] = []

    def ask(scene: Scene) -> None:
        results.extend(tuple(event.token_id for event in scene.ask(SECOND)) for _ in range(2))

    with runtime.look(IMAGES[:1], AVL) as scene:
        threads = [threading.Thread(target=ask, args=(scene,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected] * 6
    assert _is_empty(runtime)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["llama-mha", "qwen2-gqa"]), images=st.integers(1, 2), prompt=st.text(min_size=1))
def test_no_question_changes_what_stands_before_the_picture_ends(
    checkpoint: Checkpoints, name: str, images: int, prompt: str
) -> None:
    """Of tokenizers with and without bytes for every character; the placeholder merges with nothing."""
    processor = Runtime.open(checkpoint(name))._processor
    try:
        token_ids, spans = processor.lay_out(images, prompt)
    except BadInput:
        return  # no prompt, or one with special tokens
    shared, shared_spans = processor.lay_out_images(images)
    assert (token_ids[: len(shared)], spans) == (shared, shared_spans)
    assert len(shared) == spans[-1].start + spans[-1].length < len(token_ids)
    assert set(shared[-spans[-1].length :]) == {processor.image_token_id}


# Once


def test_the_picture_is_run_once_and_without_logits(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = runtime._backend
    calls: list[str] = []
    tokens: list[int] = []

    def count(name: str) -> None:
        function = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *arguments: (calls.append(name), function(*arguments))[1])

    decoder = backend._model.decoder
    embed, logits = decoder.embed, decoder.logits
    monkeypatch.setattr(decoder, "embed", lambda ids: (tokens.append(len(ids)), embed(ids))[1])
    monkeypatch.setattr(decoder, "logits", lambda hidden: (calls.append("logits"), logits(hidden))[1])
    for name in ("encode_images", "look", "prefill"):
        count(name)
    with runtime.look(IMAGES) as scene:
        stats = scene.load()
        assert calls == ["encode_images", "look"]
        assert tokens == [stats.tokens]
        assert scene.load() == stats, "loading twice is safe"
        calls.clear(), tokens.clear()
        options = Options(max_new_tokens=1)
        questions = [scene.ask(prompt, options) for prompt in (FIRST, SECOND, FIRST)]
        for question in questions:
            question.result()
        assert calls == ["prefill", "logits"] * 3
        assert tokens == [len(question.prompt) - stats.tokens for question in questions]


def test_rows_are_held_once_and_counted_where_they_are(runtime: Runtime) -> None:
    scene = runtime.look(IMAGES, FULL)
    assert (scene.stats.bytes_stored, runtime.kv_bytes_in_use) == (0, 0), "nothing is held before the first question"
    questions = [scene.ask(prompt) for prompt in (FIRST, SECOND, SECOND)]
    for question in questions:
        next(question)
    row, layers = runtime.kv_shape.row_bytes, runtime.kv_shape.layers
    stats, shared = scene.stats, scene.stats.tokens * row * layers
    own = [(len(q.prompt) - stats.tokens + q.cache.step) * row * layers for q in questions]  # type: ignore[union-attr]
    assert (stats.bytes_stored, runtime.kv_bytes_in_use) == (shared, shared + sum(own))
    assert stats.image_tokens == sum(span.length for span in questions[0].prompt.spans)
    assert (
        stats.bytes_peak
        == scene.peak_bytes
        == -(-shared // page_bytes(runtime.kv_shape)) * page_bytes(runtime.kv_shape)
    )
    plain = runtime.generate(IMAGES, FIRST, FULL).result().kv
    kv = questions[0].result().kv
    assert (kv.bytes_shared, plain.bytes_shared) == (shared, 0)
    assert kv.bytes_stored + kv.bytes_shared == plain.bytes_stored == kv.bytes_full
    assert kv.bytes_peak == questions[0]._sequence.request.plan.peak_bytes
    timings = questions[1].result().timings
    assert timings.encode_ms < 1 <= stats.encode_ms + stats.prefill_ms
    questions[2].close()
    assert runtime.kv_bytes_in_use == shared
    scene.close()
    assert _is_empty(runtime)


# Ends


def test_a_closed_scene_ends_with_its_last_question(runtime: Runtime) -> None:
    with runtime.look(IMAGES[:1], AVL) as scene:
        expected = scene.ask(SECOND).result().token_ids
    running, waiting = _two(runtime)
    scene.close()
    assert running.result().token_ids == waiting.result().token_ids == expected
    assert _is_empty(runtime)


def _two(runtime: Runtime) -> tuple[Generation, Generation]:
    """A question that runs and one that waits, about a scene that is closed and dropped."""
    scene = runtime.look(IMAGES[:1], AVL)
    running = scene.ask(SECOND)
    next(running)
    waiting, prepared = scene.ask(SECOND), scene.prepare(SECOND)
    scene.close()
    scene.close()
    for refused in (lambda: scene.ask(FIRST), lambda: runtime.submit(prepared), scene.load):
        with pytest.raises(BadInput, match="the scene is closed: look at the pictures again"):
            refused()
    assert scene.stats.bytes_stored > 0, "the question that runs reads them"
    return running, waiting


def test_a_closed_scene_waits_for_its_first_question(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture was run before the scene was closed; it is not run again."""
    scene = runtime.look(IMAGES[:1], FULL)
    scene.load()
    question = scene.ask(FIRST)
    scene.close()
    assert runtime.kv_bytes_in_use > 0
    monkeypatch.setattr(runtime._backend, "look", None)
    assert question.result().token_ids == runtime.generate(IMAGES[:1], FIRST, FULL).result().token_ids
    assert _is_empty(runtime)


@pytest.mark.parametrize("rows", [BorrowingRows, SequenceRows], ids=["a question's", "the scene's"])
def test_an_interrupt_while_rows_are_freed_loses_none(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, rows: type[SequenceRows]
) -> None:
    scene = runtime.look(IMAGES[:1], FULL)
    question, plain = scene.ask(FIRST), runtime.generate(IMAGES[:1], FIRST, FULL)
    next(question), next(plain)
    scene.close()
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
    _check(runtime, plain)
    assert not runtime._scheduler._looks
    plain.close()
    assert _is_empty(runtime)


def test_a_scene_that_is_dropped_is_closed(runtime: Runtime) -> None:
    answer = runtime.look(IMAGES[:1], FULL).ask(FIRST)
    gc.collect()
    assert len(answer.result().token_ids) == 24
    assert _is_empty(runtime)
    scene = runtime.look(IMAGES[:1], FULL)
    scene.load()
    assert runtime.kv_bytes_in_use > 0
    del scene
    gc.collect()
    assert _is_empty(runtime)


def test_a_scene_dropped_in_the_middle_of_a_step_is_freed_after_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [runtime.look(IMAGES[:1], FULL)]
    scenes[0].load()
    plain = runtime.generate(IMAGES[:1], FIRST, FULL)
    held: list[int] = []
    decode = runtime._backend.decode  # type: ignore[union-attr]

    def drop(*arguments: Any) -> Tensor:
        scenes.clear()
        gc.collect()
        held.append(len(runtime._scheduler._looks))
        return decode(*arguments)

    next(plain)
    monkeypatch.setattr(runtime._backend, "decode", drop)
    next(plain)
    assert held == [1]
    _check(runtime, plain)
    assert not runtime._scheduler._looks


@pytest.mark.parametrize("stage", ["look", "prefill", "decode"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_what_breaks_in_a_step_leaves_other_scenes(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, stage: str, kind: type[BaseException]
) -> None:
    """A scene that was being run is run anew for the next question; one that was there stays."""
    other, scene = runtime.look(IMAGES[1:], FULL), runtime.look(IMAGES[:1], FULL)
    expected = other.ask(FIRST).result().token_ids
    if stage != "look":
        scene.load()
    question = scene.ask(SECOND)

    def fail(*_: object) -> None:
        raise kind("broken")

    with monkeypatch.context() as patch:
        patch.setattr(runtime._backend, stage, fail)
        with pytest.raises(kind):
            question.result()
    assert question._sequence.result is not None
    assert question._sequence.result.finish_reason == ("error" if kind is RuntimeError else "cancelled")
    _check(runtime)
    assert (scene.stats.bytes_stored > 0) == (stage != "look")
    assert other.ask(FIRST).result().token_ids == expected
    plain = runtime.generate(IMAGES[:1], SECOND, FULL).result()
    assert scene.ask(SECOND).result().token_ids == plain.token_ids
    scene.close(), other.close()
    assert _is_empty(runtime)


def test_real_interrupts_at_any_moment_lose_no_row(runtime: Runtime) -> None:
    """A timer interrupts thirty looks, each a little later than the one before, while another scene is open."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    usual, interrupted = signal.signal(signal.SIGALRM, interrupt), 0
    kept = runtime.look(IMAGES[1:], AVL)
    expected = kept.ask(FIRST).result().token_ids
    try:
        for run in range(30):
            scene = runtime.look(IMAGES[:1], AVL)
            both = [scene.ask(prompt) for prompt in (FIRST, SECOND)]
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0007 * run)
                both[0].result()
                scene.close()
                both[1].result()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            for each in both:
                each.close()
            scene.close()
            _check(runtime)
            assert len(runtime._scheduler._looks) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert interrupted > 5
    assert kept.ask(FIRST).result().token_ids == expected
    kept.close()
    assert _is_empty(runtime)


# Memory


def test_budgets_are_kept_apart(runtime: Runtime) -> None:
    """The scene's is for the picture, which is packed as far as it asks; a question's is for its own rows."""
    exact, half = (runtime.look(IMAGES, Options(formats=each)).peak_bytes for each in (Formats(), PACKED[0]))
    found = []
    for budget in (exact, exact - 1, half - 1):
        with runtime.look(IMAGES, Options(kv_budget=budget, max_new_tokens=8)) as scene:
            kv = scene.ask(FIRST).result().kv
            stats = scene.stats
            assert stats.bytes_peak <= budget == stats.bytes_budget
            assert kv.bytes_budget is None
            assert kv.bytes_shared == stats.bytes_stored
            found.append(stats.formats["core"])
    assert found == ["exact", "int8", "int4"]
    with pytest.raises(DoesNotFit, match=r"does not hold the \d+ tokens of the scene") as refusal:
        runtime.look(IMAGES, Options(kv_budget=1000))
    least = _smallest(refusal.value)
    runtime.look(IMAGES, Options(kv_budget=least))
    with pytest.raises(DoesNotFit):
        runtime.look(IMAGES, Options(kv_budget=least - 1))
    with pytest.raises(DoesNotFit):
        runtime.look(IMAGES, Options(kv_budget=least, formats=Formats()))
    scene = runtime.look(IMAGES)
    with pytest.raises(DoesNotFit, match="tokens of the question and 8 new ones") as refusal:
        scene.ask(FIRST, Options(kv_budget=1000, max_new_tokens=8))
    least = _smallest(refusal.value)
    kv = scene.ask(FIRST, Options(kv_budget=least, max_new_tokens=8)).result().kv
    assert kv.bytes_peak == least == kv.bytes_budget
    with pytest.raises(DoesNotFit):
        scene.ask(FIRST, Options(kv_budget=least - 1, max_new_tokens=8))


def _smallest(refusal: DoesNotFit) -> int:
    found = re.search(r"smallest that would do is .*\((\d+) bytes\)", str(refusal))
    assert found
    return int(found[1])


def test_questions_wait_for_the_pool_and_what_open_scenes_hold_is_refused(checkpoint: Checkpoints) -> None:
    directory = checkpoint("mistral-gqa")
    planned = Runtime.open(directory).look(IMAGES[:1], FULL)
    scene_bytes, own = planned.peak_bytes, planned.prepare(FIRST).plan.peak_bytes
    runtime = Runtime.load(directory, pool_bytes=scene_bytes + own)
    with runtime.look(IMAGES[:1], FULL) as scene:
        waiting = [scene.ask(FIRST) for _ in range(3)]
        assert len({each.result().token_ids for each in waiting}) == 1
        other = runtime.look(IMAGES[1:], FULL)
        question, plain = other.ask(FIRST), runtime.generate(IMAGES[:1], FIRST, AVL)
        for each in (question, plain):
            with pytest.raises(DoesNotFit, match="open scenes hold the rows that this needs"):
                each.result()
        _check(runtime)
        assert scene.ask(FIRST).result().token_ids == waiting[0].result().token_ids
    assert len(other.ask(FIRST).result().token_ids) == 24
    other.close()
    with pytest.raises(DoesNotFit, match="the whole pool has"):
        runtime.look(IMAGES[:1]).ask(FIRST, Options(max_new_tokens=200))
    assert _is_empty(runtime)


def test_short_memory_leaves_shared_rows_alone(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A plain request beside them is packed, then nobody is admitted; the scene's answers stay what they were."""
    write(tmp_path, 6 * GB)
    runtime = Runtime.load(checkpoint("mistral-gqa"), reserve_bytes=2 * GB, device_root=tmp_path)
    runtime._monitor = Monitor(Limits(2 * GB), tmp_path, every_ms=0)
    scene = runtime.look(IMAGES[:1], AVL)
    expected = scene.ask(SECOND).result()
    question, plain = scene.ask(SECOND), runtime.generate(IMAGES[:1], SECOND, FULL)
    next(question), next(plain)
    write(tmp_path, GB)
    result = question.result()
    assert plain.cache is not None
    assert plain.cache.formats.core != "exact"
    assert result.token_ids == expected.token_ids
    assert vars(result.kv.pressure) | {"waited_ms": 0.0} == vars(expected.kv.pressure) | {"waited_ms": 0.0}
    _check(runtime, plain)
    late = scene.ask(FIRST)
    runtime.step()
    assert late.cache is None, "nobody is admitted"
    write(tmp_path, 6 * GB)
    late.result()


class SceneLife(RuleBasedStateMachine):
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
        self.scenes: list[Scene] = []
        self.asked: list[tuple[Generation, tuple[int, int, str]]] = []

    @rule(picture=st.sampled_from([0, 1]), packed=st.booleans(), load=st.booleans())
    def look(self, picture: int, packed: bool, load: bool) -> None:
        options = Options(formats=PACKED[0] if packed else None)
        scene = self.runtime.look(IMAGES[picture : picture + 1], options)
        self.scenes.append(scene)
        if load:
            with suppress(DoesNotFit):
                assert scene.load().bytes_peak == scene.peak_bytes

    @precondition(lambda self: bool(self.scenes))
    @rule(choice=st.integers(0, 99), method=st.integers(0, 3), prompt=st.sampled_from([FIRST, SECOND]))
    def ask(self, choice: int, method: int, prompt: str) -> None:
        scene = self.scenes[choice % len(self.scenes)]
        with suppress(DoesNotFit):
            question = scene.ask(prompt, METHODS[method])
            picture = self.pictures.index(question.prompt.spans[0].digest)
            known = (picture, method, prompt) if scene.stats.formats["core"] == "exact" else (-1, method, prompt)
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

    @precondition(lambda self: bool(self.scenes))
    @rule(choice=st.integers(0, 99), drop=st.booleans())
    def close(self, choice: int, drop: bool) -> None:
        scene = self.scenes.pop(choice % len(self.scenes))
        if not drop:
            scene.close()

    @precondition(lambda self: bool(self.asked))
    @rule(choice=st.integers(0, 99))
    def cancel(self, choice: int) -> None:
        self.asked.pop(choice % len(self.asked))[0].close()

    @rule(stage=st.sampled_from(["look", "prefill", "decode"]), kind=st.sampled_from([ValueError, KeyboardInterrupt]))
    def break_a_step(self, stage: str, kind: type[BaseException]) -> None:
        def fail(*_: object) -> None:
            raise kind

        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(self.runtime._backend, stage, fail)
            self.runtime.step()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "runtime"):
            return
        running = self.runtime._scheduler.running
        looks = [look for look in self.runtime._scheduler._looks if look.cache]
        pairs = [(each.cache, each.request.plan) for each in running] + [(look.cache, look.plan) for look in looks]
        self.runtime._pool.check_integrity([cache.rows for cache, _ in pairs if cache])
        for cache, plan in pairs:
            assert cache is not None
            lease = cache.rows.lease
            assert lease.held <= lease.peak <= lease.limit == plan.pages
        assert self.runtime.kv_bytes_in_use == sum(cache.rows.lease.nbytes for cache, _ in pairs if cache)
        for generation, known in self.asked:
            result = generation._sequence.result
            if result and result.finish_reason == "length":
                assert result.kv.bytes_peak == generation._sequence.request.plan.peak_bytes
                assert known[0] < 0 or result.token_ids == self.alone[known]

    def teardown(self) -> None:
        if not hasattr(self, "runtime"):
            return
        for scene in self.scenes:
            scene.close()
        while self.runtime.step():
            self.sound()
        assert all(generation._sequence.result for generation, _ in self.asked)
        self.sound()
        assert _is_empty(self.runtime)


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
    SceneLife.directory, SceneLife.alone, SceneLife.pictures = directory, alone, pictures
    run_state_machine_as_test(SceneLife, settings=settings(max_examples=40, stateful_step_count=25, deadline=None))


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(method="h2o"), "h2o drops rows of the picture that other questions need: choose one of full, coarse"),
        (Options(method="fastv", parameters={"drop": 0}), "fastv drops rows"),
        (Options(method="streaming"), "streaming drops rows"),
        (Options(method="random"), "random drops rows"),
        (Options(method="attentionpack"), "attentionpack drops rows"),
        (Options(method="avl"), "give avl with secondary=100 and prefill_keep=100"),
        (Options(method="avl", parameters={"secondary": 60, "prefill_keep": 100}), "give avl with secondary=100"),
        (Options(method="coarse", parameters={"secondary": 99}), "give coarse with secondary=100"),
        (Options(formats=Formats("exact", "lowrank:8", "lowrank:8")), "give both one format, exact, int8 or int4"),
        (Options(formats=Formats("exact", "int8", "int4")), "give both one format"),
        (Options(preset="paper"), "the preset paper drops rows of the picture"),
        (Options(preset="small"), "the preset small drops rows .*: give coarse with secondary=100"),
        (Options(preset="best"), "there is no preset"),
        (Options(method="best"), "unknown method"),
        (Options(parameters={"core": 10}), "'full' takes no 'core'"),
    ],
)
def test_what_cannot_share_is_refused_with_what_can(runtime: Runtime, options: Options, message: str) -> None:
    """By ``look``, and by ``ask`` of a scene that others may ask."""
    scene = runtime.look(IMAGES)
    for refused in (lambda: runtime.look(IMAGES, options), lambda: scene.ask(FIRST, options)):
        with pytest.raises(BadInput, match=message) as refusal:
            refused()
        assert "\n" not in str(refusal.value)
    assert _is_empty(runtime)


def test_what_makes_no_scene_is_refused(runtime: Runtime) -> None:
    scene, context = runtime.look(IMAGES), runtime.spec.text.context
    for refused, message in [
        (lambda: runtime.look([]), "a scene needs a picture"),
        (lambda: runtime.look("cam.jpg"), "put a single one into brackets"),
        (lambda: runtime.look(["none.jpg"]), "does not exist"),
        (lambda: runtime.look(IMAGES, {"method": "avl"}), "options must be avl_edge.Options"),  # type: ignore[arg-type]
        (lambda: runtime.look(IMAGES * 20), f"context ends at {context}"),
        (lambda: scene.ask(""), "the prompt is empty"),
        (lambda: scene.ask(FIRST, 3), "options must be avl_edge.Options"),  # type: ignore[arg-type]
        (lambda: scene.ask("boat " * context), f"context ends at {context}"),
        (lambda: scene.ask(FIRST, Options(formats=Formats("int8", "exact", "exact"))), "formats of its scene"),
        (lambda: scene.ask(FIRST, Options(preset="lossless")), "formats of its scene"),
    ]:
        with pytest.raises(BadInput, match=message):
            refused()
    with runtime.look(IMAGES, Options(preset="lossless", max_new_tokens=4)) as packed:
        assert packed.ask(FIRST).result().method == "coarse"
        assert packed.stats.formats["core"] == "int4"


def test_a_gpu_refuses_scenes(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avl_edge.runtime.CudaDevice", HostDevice)
    runtime = Runtime.open(checkpoint("llama-gqa-full", dtype=torch.float16), device="cuda")
    with pytest.raises(BadInput, match="the GPU serves no scenes"):
        runtime.look(IMAGES)


def _with_template(checkpoint: Checkpoints, folder: Path, old: str, new: str) -> Runtime:
    shutil.copytree(checkpoint("llama-mha"), folder)
    path = folder / "chat_template.jinja"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return Runtime.open(folder)


def test_a_question_before_the_picture_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    early = "{{ message['content'][-1]['text'][:3] + message['role'].upper() + ': ' }}"
    runtime = _with_template(checkpoint, tmp_path / "m", "{{ message['role'].upper() + ': ' }}", early)
    with pytest.raises(BadInput, match="writes the question before the pictures: ask one at a time"):
        runtime.look(IMAGES)


def test_a_template_that_writes_something_new_is_noticed(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the date, and it is past midnight now."""
    dated = "{{ strftime_now('%d') + message['role'].upper() + ': ' }}"
    now = ["19"]
    monkeypatch.setattr("avl_edge.prompt.template._strftime_now", lambda _: now[0])
    runtime = _with_template(checkpoint, tmp_path / "m", "{{ message['role'].upper() + ': ' }}", dated)
    scene = runtime.look(IMAGES)
    scene.prepare(FIRST)
    now[0] = "20"
    with pytest.raises(BadInput, match="look at them again"):
        scene.prepare(FIRST)


# The command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], checkpoint: Checkpoints, tmp_path: Path) -> Iterator[Any]:
    picture = tmp_path / "cam.jpg"
    IMAGES[0].save(picture)

    def call(*options: str, image: str | None = str(picture)) -> tuple[int, str, str]:
        arguments = ["run", "--model", str(checkpoint("mistral-gqa")), "--max-new-tokens", "12", *options]
        code = run_app([*arguments, *(["--image", image] if image else [])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


BOTH = ("--prompt", FIRST, "--prompt", SECOND)


def test_several_prompts_are_answered_as_each_alone(run: Any) -> None:
    alone = {prompt: json.loads(run("--json", "--prompt", prompt)[1]) for prompt in (FIRST, SECOND)}
    code, out, err = run(*BOTH)
    assert (code, err) == (0, "")
    assert out == "".join(f"{prompt}\n{document['text']}\n" for prompt, document in alone.items())
    code, out, err = run(*BOTH, "--json")
    document = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert [each["prompt"] for each in document["answers"]] == [FIRST, SECOND]
    for answer in document["answers"]:
        single = alone[answer.pop("prompt")]
        assert set(answer) == set(single)
        assert (answer["token_ids"], answer["usage"]) == (single["token_ids"], single["usage"])
        assert answer["kv"]["bytes_stored"] + answer["kv"]["bytes_shared"] == single["kv"]["bytes_stored"]
    assert document["scene"]["bytes_stored"] == document["answers"][0]["kv"]["bytes_shared"]
    code, _, err = run(*BOTH, "--stats")
    assert code == 0
    assert err.count("KV shared") == err.count("KV stored / peak / full") == 2
    assert "of rows held once" in err


def test_a_budget_holds_for_the_picture_and_all_questions(run: Any) -> None:
    whole = json.loads(run(*BOTH, "--json")[1])
    peak = whole["scene"]["bytes_peak"] + sum(each["kv"]["bytes_peak"] for each in whole["answers"])
    code, _, err = run(*BOTH, "--kv-budget", str(peak))
    assert (code, "rows exact, hold at most" in err) == (0, True)
    code, out, err = run(*BOTH, "--kv-budget", str(peak - 1), "--json")
    document = json.loads(out)
    assert (code, "2 questions, rows int8, hold at most" in err) == (0, True)
    held = document["scene"]["bytes_peak"] + sum(each["kv"]["bytes_peak"] for each in document["answers"])
    assert held < peak
    code, out, err = run(*BOTH, "--kv-budget", "10kB")
    found = re.search(r"smallest that would do is .*\((\d+) bytes\)", err)
    assert (code, out, bool(found)) == (3, "", True)
    assert found
    assert run(*BOTH, "--kv-budget", found[1])[0] == 0
    assert run(*BOTH, "--kv-budget", str(int(found[1]) - 1))[0] == 3
    assert run(*BOTH, "--kv-budget", found[1], "--kv-format", "exact")[0] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "h2o"], "choose one of full, coarse, avl"),
        (["--method", "avl"], "secondary=100 and prefill_keep=100"),
        (["--kv-format", "lowrank:8"], "give both one format"),
        (["--prompt", ""], "the prompt is empty"),
    ],
)
def test_methods_that_share_nothing_are_refused_in_a_line(run: Any, options: list[str], message: str) -> None:
    code, out, err = run(*BOTH, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("avl-edge: ")
    assert message in err
    code, _, err = run(*BOTH, image=None)
    assert (code, "several prompts share a picture: give --image" in err) == (2, True)
