"""Properties that hold between runs: degenerate settings, batches, cancellation, pools of their own size."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

from avl_edge import DoesNotFit, Options, Runtime, TooLarge
from avl_edge.kv.layout import page_bytes
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.recorder import Recorder

IMAGE, OTHER = random_image(3, (120, 80)), random_image(4, (60, 60))
PROMPT = "Describe the picture in detail."
ALL = {"prefill_keep": 100, "secondary": 100, "core": 100, "text_keep": 100}


def _avl(tokens: int = 40, **parameters: float) -> Options:
    return Options(method="avl", parameters=parameters, max_new_tokens=tokens)


@pytest.fixture(scope="module")
def runtime(checkpoint: Checkpoints) -> Runtime:
    return Runtime.load(checkpoint("mistral-gqa"), threaded=False)


@pytest.mark.parametrize("refresh", [0, 1, 3])
@pytest.mark.parametrize("name", ["mistral-gqa", "llama-bf16"])
def test_everything_kept_is_full_attention_bit_for_bit(checkpoint: Checkpoints, name: str, refresh: int) -> None:
    outputs = []
    for options in (Options(method="full", max_new_tokens=40), _avl(refresh=refresh, **ALL)):
        runtime = Runtime.load(checkpoint(name), threaded=False)
        record = Recorder(runtime)
        result = runtime.generate([IMAGE], PROMPT, options).result()
        outputs.append((result.token_ids, torch.stack(record.logits)))
    assert outputs[0][0] == outputs[1][0]
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_refreshing_every_step_is_a_core_of_all_stored_rows(runtime: Runtime) -> None:
    every = runtime.generate([IMAGE], PROMPT, _avl(refresh=1, secondary=50, core=10)).result()
    whole = runtime.generate([IMAGE], PROMPT, _avl(refresh=0, secondary=50, core=50)).result()
    assert every.token_ids == whole.token_ids
    assert every.kv.rows_read_fraction == whole.kv.rows_read_fraction
    assert (every.kv.refreshes, whole.kv.refreshes) == (39, 0)


def test_batched_requests_equal_the_requests_alone(runtime: Runtime) -> None:
    asks = [
        ([IMAGE], PROMPT, _avl()),
        ([OTHER], "How many?", Options(max_new_tokens=30)),
        ([IMAGE, OTHER], PROMPT, _avl(25)),
    ]
    alone = [runtime.generate(*ask).result() for ask in asks]
    together = [runtime.generate(*ask) for ask in asks]
    for generation, expected in zip(together, alone, strict=True):
        result = generation.result()
        assert result.token_ids == expected.token_ids
        assert result.text == expected.text
        assert result.kv == expected.kv


def test_closing_one_frees_its_rows_and_leaves_the_others(runtime: Runtime) -> None:
    expected = runtime.generate([IMAGE], PROMPT, _avl()).result()
    assert runtime.kv_bytes_in_use == 0
    kept, dropped = runtime.generate([IMAGE], PROMPT, _avl()), runtime.generate([OTHER], PROMPT, _avl())
    for _ in range(5):
        next(kept), next(dropped)
    assert kept.cache is not None
    layers = kept.cache.rows.layers
    held = sum(len(rows.text_ids) + len(rows.image_ids) for rows in layers) * runtime.kv_shape.row_bytes
    assert kept.cache.rows.lease.nbytes == held
    assert runtime.kv_bytes_in_use > held
    dropped.close()
    dropped.close()
    assert runtime.kv_bytes_in_use == held
    assert dropped.result().finish_reason == "cancelled"
    assert kept.result().token_ids == expected.token_ids
    assert runtime.kv_bytes_in_use == 0


def test_a_dropped_generation_frees_its_rows(runtime: Runtime) -> None:
    generation = runtime.generate([IMAGE], PROMPT, _avl())
    next(generation)
    assert runtime.kv_bytes_in_use > 0
    del generation
    gc.collect()
    assert runtime.kv_bytes_in_use == 0


def test_a_waiting_request_can_be_closed(runtime: Runtime) -> None:
    waiting = runtime.generate([IMAGE], PROMPT, _avl())
    waiting.close()
    assert list(waiting) == []
    assert waiting.result().text == ""


def test_requests_wait_for_the_pool_and_are_served_in_order(checkpoint: Checkpoints) -> None:
    directory = checkpoint("mistral-gqa")
    peak = Runtime.open(directory, threaded=False).prepare([IMAGE], PROMPT, _avl()).plan.peak_bytes
    runtime = Runtime.load(directory, pool_bytes=peak, threaded=False)
    generations = [runtime.generate([IMAGE], PROMPT, _avl()) for _ in range(3)]
    last = generations[2].result()
    assert all(generation.result().token_ids == last.token_ids for generation in generations)
    with pytest.raises(DoesNotFit, match="the whole pool"):
        runtime.generate([IMAGE], PROMPT, Options(max_new_tokens=200))


def test_a_budget_is_kept_at_every_step(checkpoint: Checkpoints) -> None:
    runtime = Runtime.load(checkpoint("llama3-rope"), threaded=False)
    full = runtime.generate([IMAGE], PROMPT, Options(max_new_tokens=60)).result().kv
    for share in (0.95, 0.8, 0.65, 0.5):
        budget = int(full.bytes_full * share)
        generation = runtime.generate([IMAGE], PROMPT, Options(kv_budget=budget, max_new_tokens=60))
        for _ in generation:
            assert runtime.kv_bytes_in_use <= budget
        kv = generation.result().kv
        assert kv.bytes_peak <= budget
        assert kv.bytes_stored <= kv.bytes_peak < full.bytes_peak
    with pytest.raises(DoesNotFit, match="the smallest that would do"):
        runtime.prepare([IMAGE], PROMPT, Options(kv_budget=1000))


def test_the_peak_of_prefill_is_what_is_kept_not_the_full_cache(runtime: Runtime) -> None:
    generation = runtime.generate([IMAGE], PROMPT, _avl(1, secondary=20, core=10))
    kv = generation.result().kv
    tokens = len(generation.prompt)
    assert kv.bytes_full == tokens * runtime.kv_shape.layers * runtime.kv_shape.row_bytes
    page = page_bytes(runtime.kv_shape)
    assert kv.bytes_peak == -(-kv.bytes_stored // page) * page < 0.6 * kv.bytes_full
    for layer in kv.layers:
        assert layer["text"] + layer["core"] + layer["secondary"] + layer["freed"] == tokens


def test_stats_count_what_was_read(runtime: Runtime) -> None:
    kv = runtime.generate([IMAGE], PROMPT, _avl(31, secondary=50, core=20, refresh=5)).result().kv
    assert kv.refreshes == 6
    assert kv.rows_read_fraction < 0.9
    assert runtime.generate([IMAGE], PROMPT, Options(max_new_tokens=5)).result().kv.rows_read_fraction == 1.0


def test_sampling_repeats_from_its_seed(runtime: Runtime) -> None:
    def tokens(seed: int, **options: float) -> tuple[int, ...]:
        return runtime.generate([IMAGE], PROMPT, Options(seed=seed, max_new_tokens=20, **options)).result().token_ids  # type: ignore[arg-type]

    assert tokens(1, temperature=1.0) == tokens(1, temperature=1.0) != tokens(2, temperature=1.0)
    assert tokens(1, temperature=1.0, top_p=1e-6) == tokens(1)


def test_events_spell_the_text_and_the_last_one_says_why(runtime: Runtime) -> None:
    generation = runtime.generate([IMAGE], PROMPT, Options(max_new_tokens=12))
    events = list(generation)
    result = generation.result()
    assert "".join(event.text for event in events) == result.text
    assert tuple(event.token_id for event in events) == result.token_ids
    assert [event.finish_reason for event in events] == [None] * 11 + ["length"]


def test_the_answer_ends_at_the_context(runtime: Runtime) -> None:
    context = runtime.spec.text.context
    generation = runtime.generate([IMAGE], PROMPT, Options(max_new_tokens=10_000))
    result = generation.result()
    assert result.usage.prompt_tokens + result.usage.completion_tokens == context
    assert result.finish_reason == "length"
    with pytest.raises(TooLarge, match=f"context ends at {context}"):
        runtime.prepare([IMAGE], "boat " * context)


def test_an_error_in_a_step_ends_its_requests_and_frees_their_rows(checkpoint: Checkpoints) -> None:
    runtime = Runtime.load(checkpoint("mistral-gqa"), threaded=False)
    generation = runtime.generate([IMAGE], PROMPT, _avl())
    next(generation)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    runtime.debug.backend.decode = fail  # type: ignore[union-attr, method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert runtime.kv_bytes_in_use == 0
    assert generation.result().finish_reason == "cancelled"


def test_threads_may_iterate_their_own_generations(checkpoint: Checkpoints) -> None:
    runtime = Runtime.load(checkpoint("mistral-gqa"))
    expected = runtime.generate([IMAGE], PROMPT, _avl()).result().token_ids
    results: list[tuple[int, ...]] = []
    generations = [runtime.generate([IMAGE], PROMPT, _avl()) for _ in range(3)]
    threads = [
        threading.Thread(target=lambda each=each: results.append(tuple(event.token_id for event in each)))
        for each in generations
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 3


def test_a_picture_is_encoded_once_for_several_questions(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And answers do not depend on whether it was."""
    runtime = Runtime.load(checkpoint("llama-mha"), threaded=False)
    assert runtime.debug.backend is not None
    encoded: list[int] = []
    encode = runtime.debug.backend.begin_encode

    def count(pixels: Any) -> Any:
        encoded.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(runtime.debug.backend, "begin_encode", count)
    spec, features = runtime.spec, runtime.debug.features
    assert features is not None
    one = 4 * spec.tokens_per_image * spec.text.hidden_size
    runtime.debug.ledger["features"].limit = 4 * one + 1
    pictures = [random_image(seed, (60, 60)) for seed in range(5)]
    options = Options(max_new_tokens=6)
    first = runtime.generate([pictures[0]], PROMPT, options).result()
    again = runtime.generate([pictures[0]], PROMPT, options).result()
    assert encoded == [1]
    assert first.token_ids == again.token_ids
    runtime.generate(pictures[:2], PROMPT, options).result()
    assert encoded == [1, 2], "in other company it is encoded again"
    for picture in pictures[1:]:
        runtime.generate([picture], PROMPT, options).result()
    runtime.generate([pictures[0]], PROMPT, options).result()
    assert encoded == [1, 2, 1, 1, 1, 1, 1], "the oldest one was given up"
