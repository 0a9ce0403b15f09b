"""Several questions about one picture: the answers are those of plain requests, the picture is run and held once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from avl_edge import BadInput, Formats, Generation, ImageSession, Options, Runtime
from avl_edge.kv.layout import page_bytes
from avl_edge.model.families import read_spec
from avl_edge.model.prompt import Processor, Turn
from avl_edge.model.prompt.chat import one_question
from tests.conftest import Checkpoints
from tests.equipment import oracle, oracle_shared_prefix
from tests.equipment.checkpoints import SPECS
from tests.equipment.held_rows import held_rows
from tests.equipment.image_sessions import (
    AVL,
    COARSE,
    FIRST,
    FULL,
    IMAGES,
    PROMPT_MEAN,
    SECOND,
    WHOLE,
    check,
    is_empty,
)
from tests.equipment.oracle import AvlSettings, OracleStep
from tests.equipment.oracle_formats import TierFormats
from tests.equipment.oracle_shared_prefix import PrefixOracle
from tests.equipment.pixels import stacked
from tests.equipment.prompts_first import STEPPED
from tests.equipment.recorder import Recorder


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Runtime:
    return Runtime.load(checkpoint("mistral-gqa"), threaded=False)


@pytest.mark.parametrize(
    ("name", "images"), [(n, 1 + i % 2) for i, n in enumerate(SPECS) if SPECS[n].dtype == torch.float32]
)
def test_full_attention_equals_transformers(checkpoint: Checkpoints, name: str, images: int) -> None:
    """Both of two questions, the second about a picture that was run for the first."""
    runtime = Runtime.load(checkpoint(name), threaded=False)
    logits = Recorder(runtime).logits
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint(name)).eval()
    with runtime.open_images(IMAGES[:images], FULL) as session:
        for prompt in (FIRST, SECOND):
            logits.clear()
            question = session.ask(prompt)
            tokens = list(question.result().token_ids)
            ids = torch.tensor([question.prompt.token_ids])
            pixels = torch.from_numpy(stacked(runtime.prepare(IMAGES[:images], prompt).prompt))
            with torch.no_grad():
                expected = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=24, do_sample=False)
                whole = torch.cat([ids, torch.tensor([tokens])], 1)
                truth = model(input_ids=whole, pixel_values=pixels).logits[0, ids.shape[1] - 1 : -1]
            assert tokens == expected[0, ids.shape[1] :].tolist()
            assert (torch.stack(logits) - truth).abs().max() <= 2e-4
    assert is_empty(runtime)


def test_bfloat16_is_as_close_to_float64_as_a_plain_request(checkpoint: Checkpoints) -> None:
    directory = checkpoint("llama-bf16")
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float64).eval()
    errors = []
    for shared in (False, True):
        runtime = Runtime.load(directory, threaded=False)
        logits = Recorder(runtime).logits
        session = runtime.open_images(IMAGES, FULL)
        question = session.ask(SECOND) if shared else runtime.generate(IMAGES, SECOND, FULL)
        tokens, prompt = list(question.result().token_ids), runtime.prepare(IMAGES, SECOND).prompt
        assert prompt.token_ids == question.prompt.token_ids
        ids = torch.tensor([[*prompt.token_ids, *tokens]])
        with torch.no_grad():
            exact = model(input_ids=ids, pixel_values=torch.from_numpy(stacked(prompt)).double()).logits
        errors.append((torch.stack(logits) - exact[0, len(prompt) - 1 : -1]).square().mean().sqrt())
    assert errors[1] <= 1.25 * errors[0]


@pytest.mark.parametrize("options", [FULL, AVL, COARSE, PROMPT_MEAN], ids=["full", "avl", "coarse", "prompt_mean"])
@pytest.mark.parametrize(("name", "images"), [("llama-mha", 1), ("qwen2-gqa", 2), ("mistral-wide", 2)])
def test_a_question_is_answered_as_by_a_plain_request(
    checkpoint: Checkpoints, name: str, images: int, options: Options
) -> None:
    """The same tokens, the same rows in every tier of every layer after each step, the same rows read."""
    runtime = Runtime.load(checkpoint(name, dtype=torch.float64), **STEPPED)
    with runtime.open_images(IMAGES[:images], options) as session:
        session.ask(FIRST).result()
        question, plain = session.ask(SECOND), runtime.generate(IMAGES[:images], SECOND, options)
        for expected in plain:
            event = next(question)
            assert event == expected
            if event.finish_reason is None:
                assert held_rows(question.cache) == held_rows(plain.cache)
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
    runtime = Runtime.load(directory, threaded=False)
    session = runtime.open_images(IMAGES[:images])
    session.load()
    question = session.ask(SECOND, Options(method="avl", parameters=settings, max_new_tokens=32))
    ids = torch.tensor([question.prompt.token_ids])
    pixels = torch.from_numpy(stacked(runtime.prepare(IMAGES[:images], SECOND).prompt))
    expected = oracle.generate(oracle.load_model(directory), ids, pixels, AvlSettings(**settings), 32)
    _compare(question, expected)


def _compare(question: Generation, expected: list[OracleStep]) -> None:
    for step, truth in enumerate(expected):
        event = next(question)
        assert event.token_id == truth.token, f"step {step}"
        if event.finish_reason is None:
            assert held_rows(question.cache) == truth.rows, f"step {step}"


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
    runtime = Runtime.load(directory, threaded=False)
    logits = Recorder(runtime).logits
    session = runtime.open_images(IMAGES[:images], Options(formats=Formats(tiers.text, tiers.core, tiers.secondary)))
    prompt = session.prepare(SECOND).prompt
    pixels = torch.from_numpy(stacked(prompt))
    truth = PrefixOracle(oracle_shared_prefix.load_model(directory), list(prompt.token_ids), pixels, tiers)
    parameters: dict[str, int] = {}
    if method == "coarse":
        parameters = {"core": 40, "mass": 70}
        expected = truth.coarse(100, 40, 70, steps)
    elif method == "avl":
        parameters = {**WHOLE, "core": 25, "refresh": 2, "text_keep": 60, "text_floor": 4}
        expected = truth.avl(AvlSettings(**parameters), steps)
    else:
        expected = truth.avl(AvlSettings(100, 100, 100, refresh=0, text_keep=100), steps)
    _compare(session.ask(SECOND, Options(method, parameters, max_new_tokens=steps)), expected)
    torch.testing.assert_close(torch.stack(logits), torch.stack([step.logits for step in expected]), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "images", "tiers"),
    [
        ("llama-mha", 1, TierFormats()),
        ("qwen2-gqa", 2, TierFormats("int8", "int4", "int4")),
        ("mistral-wide", 2, TierFormats("exact", "int8", "int8")),
    ],
)
@pytest.mark.parametrize("method", ["full", "distinct", "coarse", "avl"])
def test_a_session_of_what_stands_out_equals_the_oracle(
    checkpoint: Checkpoints, name: str, images: int, tiers: TierFormats, method: str
) -> None:
    """What the session did not store no question sees, in prefill or later; each picks its core from what there is."""
    directory, steps, share = checkpoint(name, dtype=torch.float64), 16, 40
    runtime = Runtime.load(directory, threaded=False)
    logits = Recorder(runtime).logits
    formats = Formats(tiers.text, tiers.core, tiers.secondary)
    session = runtime.open_images(IMAGES[:images], Options("distinct", {"secondary": share}, formats))
    prompt = session.prepare(SECOND).prompt
    pixels = torch.from_numpy(stacked(prompt))
    truth = PrefixOracle(oracle_shared_prefix.load_model(directory), list(prompt.token_ids), pixels, tiers)
    truth.share = share
    parameters: dict[str, int] = {}
    if method == "coarse":
        parameters = {"secondary": share, "core": 25, "mass": 70}
        expected = truth.coarse(*parameters.values(), steps)
    elif method == "avl":
        parameters = {"secondary": 50, "prefill_keep": 100, "by_values": 1, "core": 20, "refresh": 2, "text_floor": 4}
        expected = truth.avl(AvlSettings(**parameters), steps)
    else:
        parameters = {"secondary": share} if method == "distinct" else {}
        everything = AvlSettings(100, share, share, refresh=0, text_keep=100, by_values=1)
        expected = truth.avl(everything, steps)
    assert all(len(rows.core) < share * len(truth.images) // 100 for rows in expected[1].rows) == (
        method in ("coarse", "avl")
    )
    _compare(session.ask(SECOND, Options(method, parameters, max_new_tokens=steps)), expected)
    torch.testing.assert_close(torch.stack(logits), torch.stack([step.logits for step in expected]), rtol=0, atol=5e-5)
    stored = [len(rows.image_ids) for rows in runtime.debug.scheduler.prefixes[0].cache.rows]
    assert stored == [share * len(truth.images) // 100] * len(stored)


def test_packing_is_noticed_before_the_question(checkpoint: Checkpoints) -> None:
    """A plain request attends its own picture exactly, so that equality above means something."""
    runtime = Runtime.load(checkpoint("llama-mha", dtype=torch.float64), threaded=False)
    logits = Recorder(runtime).logits
    options = Options(formats=Formats("exact", "int4", "int4"), max_new_tokens=1)
    runtime.generate(IMAGES, SECOND, options).result()
    runtime.open_images(IMAGES, options).ask(SECOND).result()
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_questions_at_once_are_answered_as_each_alone(runtime: Runtime) -> None:
    asks = [(FIRST, FULL), (SECOND, AVL), (FIRST, COARSE), (SECOND, PROMPT_MEAN)]
    with runtime.open_images(IMAGES[:1]) as session:
        alone = [session.ask(*ask).result() for ask in asks]
        together, plain = [session.ask(*ask) for ask in asks], runtime.generate(IMAGES[1:], FIRST, FULL)
        for generation in (*together, plain):
            next(generation)
        assert len(runtime.debug.scheduler.running) == 5, "in one batch"
        assert len(set(map(_core, together))) > 2, "each has a core of its own"
        check(runtime, *together, plain)
        results = [generation.result() for generation in together]
    for result, expected in zip(results, alone, strict=True):
        assert (result.token_ids, result.text, result.kv) == (expected.token_ids, expected.text, expected.kv)
    plain.close()
    assert is_empty(runtime)


def _core(generation: Generation) -> tuple[int, ...]:
    assert generation.cache is not None
    rows = generation.cache.rows.layers[-1]
    return tuple(rows.image_positions[rows.core].tolist())


def test_threads_may_ask_about_one_session(checkpoint: Checkpoints) -> None:
    runtime = Runtime.load(checkpoint("mistral-gqa"))
    expected = runtime.generate(IMAGES[:1], SECOND, AVL).result().token_ids
    results: list[tuple[int, ...]] = []

    def ask(session: ImageSession) -> None:
        results.extend(tuple(event.token_id for event in session.ask(SECOND)) for _ in range(2))

    with runtime.open_images(IMAGES[:1], AVL) as session:
        threads = [threading.Thread(target=ask, args=(session,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected] * 6
    assert is_empty(runtime)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["llama-mha", "qwen2-gqa"]), images=st.integers(1, 2), prompt=st.text(min_size=1))
def test_no_question_changes_what_stands_before_the_picture_ends(
    checkpoint: Checkpoints, name: str, images: int, prompt: str
) -> None:
    """Of tokenizers with and without bytes for every character; the placeholder merges with nothing."""
    processor = Processor.of(read_spec(checkpoint(name)), checkpoint(name))
    pictures = [processor.codec.rule(60, 60)] * images
    try:
        whole = processor.lay_out(one_question(pictures, prompt))
    except BadInput:
        return  # no prompt, or one with special tokens
    shared, spans = processor.lay_out_images([Turn("user", tuple(pictures))]), whole.spans
    assert (whole.token_ids[: len(shared)], spans) == (shared.token_ids, shared.spans)
    assert len(shared) == spans[-1].start + spans[-1].length < len(whole)
    assert set(shared.token_ids[-spans[-1].length :]) == {processor.image_token_id}


def test_the_picture_is_run_once_and_without_logits(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = runtime.debug.backend
    calls: list[str] = []
    tokens: list[int] = []

    def count(name: str) -> None:
        function = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *arguments: (calls.append(name), function(*arguments))[1])

    decoder = backend.model.decoder
    embed, logits = decoder.embed, decoder.logits
    monkeypatch.setattr(decoder, "embed", lambda ids: (tokens.append(len(ids)), embed(ids))[1])
    monkeypatch.setattr(decoder, "logits", lambda hidden: (calls.append("logits"), logits(hidden))[1])
    for name in ("begin_encode", "begin_prefill"):
        count(name)
    with runtime.open_images(IMAGES) as session:
        stats = session.load()
        assert calls == ["begin_encode", "begin_prefill"]
        assert tokens == [stats.tokens]
        assert session.load() == stats, "loading twice is safe"
        calls.clear(), tokens.clear()
        options = Options(max_new_tokens=1)
        questions = [session.ask(prompt, options) for prompt in (FIRST, SECOND, FIRST)]
        for question in questions:
            question.result()
        assert calls == ["begin_prefill", "logits"] * 3
        assert tokens == [len(question.prompt) - stats.tokens for question in questions]


def test_rows_are_held_once_and_counted_where_they_are(runtime: Runtime) -> None:
    session = runtime.open_images(IMAGES, FULL)
    assert (session.stats.bytes_stored, runtime.kv_bytes_in_use) == (0, 0), "nothing is held before the first question"
    questions = [session.ask(prompt) for prompt in (FIRST, SECOND, SECOND)]
    for question in questions:
        next(question)
    row, layers = runtime.kv_shape.row_bytes, runtime.kv_shape.layers
    stats, shared = session.stats, session.stats.tokens * row * layers
    own = [(len(q.prompt) - stats.tokens + q.cache.step) * row * layers for q in questions]  # type: ignore[union-attr]
    assert (stats.bytes_stored, runtime.kv_bytes_in_use) == (shared, shared + sum(own))
    assert stats.image_tokens == sum(span.length for span in questions[0].prompt.spans)
    assert (
        stats.bytes_peak
        == session.peak_bytes
        == -(-shared // page_bytes(runtime.kv_shape)) * page_bytes(runtime.kv_shape)
    )
    plain = runtime.generate(IMAGES, FIRST, FULL).result().kv
    kv = questions[0].result().kv
    assert (kv.bytes_shared, plain.bytes_shared) == (shared, 0)
    assert kv.bytes_stored + kv.bytes_shared == plain.bytes_stored == kv.bytes_full
    assert kv.bytes_peak == questions[0].request.plan.peak_bytes
    timings = questions[1].result().timings
    assert timings.encode_ms < 1 <= stats.encode_ms + stats.prefill_ms
    questions[2].close()
    assert runtime.kv_bytes_in_use == shared
    session.close()
    assert is_empty(runtime)
