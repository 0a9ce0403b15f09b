"""Who waits for memory, who goes on meanwhile, and what breaks off while memory is given back."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from avl_edge import Formats, Options, Runtime
from avl_edge.errors import BadInput, Busy, StepFailed
from tests.conftest import Checkpoints
from tests.equipment.machines import GB, write
from tests.equipment.short_memory import ask, check, watchful

FULL_EXACT = {"text": "exact", "core": "exact", "secondary": "exact"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path, 6 * GB)
    return tmp_path


@pytest.fixture
def runtime(checkpoint: Checkpoints, tree: Path) -> Runtime:
    return watchful(checkpoint, tree)


def test_who_comes_under_pressure_waits_and_says_so(
    runtime: Runtime, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With nobody running there is nothing to give: the request is held at once, and admitted when there is room."""
    write(tree, GB)
    generation = ask(runtime)
    with caplog.at_level(logging.WARNING, "avl_edge"):
        for _ in range(3):
            assert runtime.debug.engine.run_once()
        assert generation.cache is None
        assert runtime.debug.scheduler.is_held
        write(tree, 2 * GB + 10**6)
        assert runtime.debug.engine.run_once()
        assert runtime.debug.scheduler.is_held, "it would flutter"
        write(tree, 6 * GB)
        result = generation.result()
    assert not runtime.debug.scheduler.is_held
    assert result.finish_reason == "length"
    assert 60 <= result.kv.pressure.waited_ms < 60_000
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "avl-edge: memory is short",
        "avl-edge: there is memory again",
    ]
    assert ask(runtime).result().kv.pressure.waited_ms == 0


def test_nobody_waits_for_ever(runtime: Runtime, tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said with the limit as the waiting begins; then the request ends, and the next one is served."""
    runtime.keep_free(2 * GB, root=tree, every_ms=0, most_wait_s=0.2)
    write(tree, GB)
    with (
        caplog.at_level(logging.WARNING, "avl_edge"),
        pytest.raises(Busy, match=r"short for 0\.2 s .*--reserve"),
    ):
        ask(runtime).result()
    assert caplog.records[0].message.endswith("new requests wait, 0.2 s at most")
    write(tree, 6 * GB)
    assert ask(runtime).result().finish_reason == "length"


def test_a_reserve_that_leaves_no_room_for_this_process_is_refused(runtime: Runtime, tree: Path) -> None:
    """The tree has 8.2 GB, and this process, with torch in it, some hundred megabytes."""
    runtime.keep_free(7 * GB, root=tree)
    with pytest.raises(BadInput, match=r"cannot be kept: there are 8\.2 GB, of which this process"):
        runtime.keep_free(8_191_000_000, root=tree)
    with pytest.raises(BadInput, match="most_wait_s"):
        runtime.keep_free(GB, root=tree, most_wait_s=0)


def test_who_runs_goes_on_while_others_wait(runtime: Runtime, tree: Path) -> None:
    first = ask(runtime)
    next(first)
    write(tree, GB)
    for _ in range(4):
        next(first)
    assert runtime.debug.scheduler.is_held
    second = ask(runtime)
    assert first.result().finish_reason == "length"
    assert second.cache is None
    assert runtime.debug.engine.run_once()
    assert second.cache is None
    cancelled = ask(runtime)
    runtime.debug.engine.run_once()
    cancelled.close()
    assert cancelled.result().finish_reason == "cancelled"
    assert cancelled.result().kv.pressure.waited_ms > 0
    write(tree, 6 * GB)
    assert second.result().finish_reason == "length"
    assert second.result().kv.pressure.waited_ms > cancelled.result().kv.pressure.waited_ms
    assert second.result().formats == FULL_EXACT


def test_a_waiting_thread_lets_others_in(checkpoint: Checkpoints, tree: Path) -> None:
    """Another may cancel, ask or end the pressure meanwhile."""
    runtime = watchful(checkpoint, tree, threaded=True)
    write(tree, GB)
    generation = ask(runtime)
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(generation.result()), daemon=True)
    thread.start()
    other = ask(runtime)
    other.close()
    assert not done
    write(tree, 6 * GB)
    thread.join(30)
    assert done[0].finish_reason == "length"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_breaks_off_an_escalation_ends_that_request_and_no_other(
    runtime: Runtime, tree: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    expected = ask(runtime, Options(max_new_tokens=30, formats=Formats("exact", "int8", "int8"))).result().token_ids
    first, second = ask(runtime), ask(runtime)
    next(first), next(second)
    write(tree, GB)
    rows = runtime.debug.rows
    assert rows is not None
    demote, calls = rows.demote, 0

    def fails_once(*arguments: Any) -> bool:
        nonlocal calls
        calls += 1
        done = demote(*arguments)
        if calls == 1:
            raise error
        return done

    monkeypatch.setattr(rows, "demote", fails_once)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            runtime.debug.engine.run_once()
    else:
        runtime.debug.engine.run_once()
        write(tree, 6 * GB)
    check(runtime, second)
    assert first.finish_reason == ("error" if error is MemoryError else "cancelled")
    assert first.cache is None
    if error is KeyboardInterrupt:
        runtime.debug.engine.run_once()
        write(tree, 6 * GB)
    assert second.result().token_ids == expected
    assert runtime.kv_bytes_in_use == 0
    if error is MemoryError:
        with pytest.raises(StepFailed, match="MemoryError"):
            list(first)


def test_who_was_let_in_before_an_interrupt_gives_nothing_yet(
    runtime: Runtime, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that let it in ended before it took a row, and in the next one memory is short."""
    expected = ask(runtime).result().token_ids
    generation, scheduler = ask(runtime), runtime.debug.scheduler
    let_in = scheduler.next

    def interrupted(now: float) -> None:
        let_in(now)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "next", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime.debug.engine.run_once()
    write(tree, GB)
    runtime.debug.engine.run_once()
    write(tree, 6 * GB)
    assert generation.result().token_ids == expected
    assert generation.result().kv.pressure.demotions == 0
    check(runtime, generation)
