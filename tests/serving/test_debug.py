"""The debug view of a runtime: its parts as they are now, and another backend in the place of its own."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from avl_edge import Options, Runtime
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.machines import GB, write
from tests.equipment.recorder import Recorder

IMAGE = random_image(3, (120, 80))
PROMPT = "Describe the picture in detail."
OPTIONS = Options(max_new_tokens=8)


def test_what_is_not_there_yet_is_none(checkpoint: Checkpoints, tmp_path: Path) -> None:
    write(tmp_path, 6 * GB)
    runtime = Runtime.open(checkpoint("mistral-gqa"), threaded=False)
    before = runtime.debug
    assert (before.backend, before.rows, before.features, before.monitor, before.device_watcher) == (None,) * 5
    assert (before.scheduler.waiting, before.scheduler.running, before.pool.pages) == ((), (), 0)
    runtime.keep_free(GB, root=tmp_path)
    runtime.follow(root=tmp_path)
    runtime.load_weights()
    after = runtime.debug
    assert None not in (after.backend, after.rows, after.features, after.monitor, after.device_watcher)
    assert after.pool.pages > 0
    assert before.backend is None, "a view is of its moment"
    with pytest.raises(FrozenInstanceError):
        after.backend = None  # type: ignore[misc]


def test_the_scheduler_shows_who_waits_and_who_runs(checkpoint: Checkpoints) -> None:
    directory = checkpoint("mistral-gqa")
    peak = Runtime.open(directory, threaded=False).prepare([IMAGE], PROMPT, OPTIONS).plan.peak_bytes
    runtime = Runtime.load(directory, pool_bytes=peak, threaded=False)
    scheduler, pool = runtime.debug.scheduler, runtime.debug.pool
    first, second = (runtime.generate([IMAGE], PROMPT, OPTIONS) for _ in range(2))
    assert [each.request for each in scheduler.waiting] == [first.request, second.request]
    next(first)
    assert [each.request for each in scheduler.running] == [first.request]
    assert [each.request for each in scheduler.waiting] == [second.request]
    assert (first.finish_reason, second.finish_reason) == (None, None)
    first.result(), second.close()
    assert (first.finish_reason, second.finish_reason) == ("length", "cancelled")
    assert (scheduler.waiting, scheduler.running) == ((), ())
    with runtime.open_images([IMAGE]) as session:
        assert scheduler.prefixes == (), "it holds nothing before its first question"
        session.load()
        (prefix,) = scheduler.prefixes
        assert prefix.cache is not None
        assert prefix.cache.rows.lease.nbytes == session.stats.bytes_stored == pool.bytes_in_use
    assert scheduler.prefixes == ()
    assert pool.pages_unreserved == pool.pages


def test_another_backend_goes_on_where_the_first_one_was(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the same rows, with the next step; and pictures are encoded by it, also those that were encoded before."""
    expected = (
        Runtime.load(checkpoint("mistral-gqa"), threaded=False).generate([IMAGE], PROMPT, OPTIONS).result().token_ids
    )
    runtime = Runtime.load(checkpoint("mistral-gqa"), threaded=False)
    generation = runtime.generate([IMAGE], PROMPT, OPTIONS)
    for _ in range(3):
        next(generation)
    recorder = Recorder(runtime)
    assert runtime.debug.backend is recorder
    encode, encoded = recorder.begin_encode, list[int]()

    def count(pixels: Any) -> Any:
        encoded.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(recorder, "begin_encode", count)
    assert generation.result().token_ids == expected
    assert [int(logits.argmax()) for logits in recorder.logits] == list(expected[3:])
    assert runtime.generate([IMAGE], PROMPT, OPTIONS).result().token_ids == expected
    assert encoded == [1]
