"""A runtime whose machine runs short of memory gives it back: in order, within its budgets, no more than it has to."""

from __future__ import annotations

from pathlib import Path

import pytest

from avl_edge import Formats, Options, Runtime
from avl_edge.kv.budget import peak_pages
from avl_edge.kv.cache import prompt_shape
from tests import ROOT
from tests.conftest import Checkpoints
from tests.equipment.machines import GB, write
from tests.equipment.short_memory import AVL, FULL, IMAGE, PROMPT, RESERVE, ask, check, formats_of, watchful


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write(tmp_path, 6 * GB)
    return tmp_path


@pytest.fixture
def runtime(checkpoint: Checkpoints, tree: Path) -> Runtime:
    return watchful(checkpoint, tree)


def test_with_enough_memory_nothing_happens(runtime: Runtime, checkpoint: Checkpoints) -> None:
    expected = ask(Runtime.load(checkpoint("mistral-gqa"), threaded=False), AVL).result()
    result = ask(runtime, AVL).result()
    assert result.token_ids == expected.token_ids
    assert result.kv == expected.kv
    assert vars(result.kv.pressure) == {"demotions": 0, "rows_evicted": 0, "waited_ms": 0.0, "bytes_given_back": 0}


def test_memory_that_comes_and_goes_above_the_reserve_changes_nothing(runtime: Runtime, tree: Path) -> None:
    expected = ask(runtime, AVL).result().token_ids
    generation = ask(runtime, AVL)
    for number, _ in enumerate(generation):
        write(tree, (3 + number % 5) * GB)
    assert generation.result().token_ids == expected
    assert generation.result().kv.pressure.demotions == 0


def test_formats_then_rows_then_requests(runtime: Runtime, tree: Path) -> None:
    """A-VL under pressure from its fourth token on: one level a step, in order, and the core stays as it is.

    Rows this small take as many pages in int8/int4 as in int8: that level is passed over."""
    generation = ask(runtime, AVL)
    for _ in range(3):
        next(generation)
    write(tree, GB)
    seen = []
    for _ in range(8):
        next(generation)
        check(runtime, generation)
        assert generation.cache is not None
        stored = sum(len(rows.image_ids) for rows in generation.cache.rows)
        seen.append((formats_of(generation).secondary, stored, runtime.debug.scheduler.is_held))
    rows = [count for _, count, _ in seen]
    assert [name for name, _, _ in seen] == ["int8", "int4"] + ["int4"] * 6
    assert rows[0] == rows[1] == 5 * 36
    assert sorted(set(rows), reverse=True) == rows[1:6]
    assert rows[5] == rows[-1] == 5 * 14
    assert [held for _, _, held in seen] == [False] * 6 + [True] * 2
    assert (formats_of(generation).core, formats_of(generation).text) == ("exact", "exact")
    write(tree, 6 * GB)
    result = generation.result()
    assert (result.finish_reason, len(result.token_ids)) == ("length", 40)
    assert result.formats == {"text": "exact", "core": "exact", "secondary": "int4"}
    assert (result.kv.pressure.demotions, result.kv.pressure.rows_evicted) == (2, 5 * 22)
    assert not runtime.debug.scheduler.is_held
    assert ask(runtime, AVL).result().formats["secondary"] == "exact"


def test_features_of_earlier_pictures_go(runtime: Runtime, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a convenience: memory that is short takes them, and the next question encodes its picture again."""
    encoded: list[int] = []
    encode = runtime.debug.backend.begin_encode  # type: ignore[union-attr]
    monkeypatch.setattr(runtime.debug.backend, "begin_encode", lambda pixels: encoded.append(1) or encode(pixels))
    ask(runtime).result()
    ask(runtime).result()
    assert len(encoded) == 1
    write(tree, GB)
    runtime.debug.engine.run_once()
    write(tree, 6 * GB)
    ask(runtime).result()
    assert len(encoded) == 2


def test_pressure_before_there_are_weights(checkpoint: Checkpoints, tree: Path) -> None:
    runtime = Runtime.open(checkpoint("mistral-gqa"), threaded=False)
    runtime.keep_free(RESERVE, root=tree)
    write(tree, GB)
    assert not runtime.debug.engine.run_once()


def test_low_rank_rows_can_only_go(runtime: Runtime, tree: Path) -> None:
    """There is no smaller format for them. The basis of their layer stays, and moves with the other rows."""
    options = Options("avl", {"secondary": 90, "core": 30}, Formats("exact", "exact", "lowrank:8"), max_new_tokens=30)
    generation = ask(runtime, options)
    for _ in range(4):
        next(generation)
    write(tree, GB)
    for _ in range(8):
        next(generation)
        check(runtime, generation)
    assert generation.cache is not None
    assert [len(rows.basis) for rows in generation.cache.rows] == [8] * 5
    pressure = generation.result().kv.pressure
    assert (pressure.demotions, pressure.rows_evicted) == (0, 5 * (32 - 10))


def test_full_attention_packs_all_image_rows(runtime: Runtime, tree: Path) -> None:
    generation = ask(runtime)
    next(generation)
    write(tree, GB)
    next(generation)
    assert formats_of(generation) == Formats("exact", "int8", "int8")
    write(tree, 6 * GB)
    next(generation)
    assert formats_of(generation) == Formats("exact", "int8", "int8"), "rows were promoted again"
    cache, request = generation.cache, generation.request
    assert cache is not None
    shape = prompt_shape(len(request.prompt), request.prompt.spans)
    promised = peak_pages(request.plan.method, cache.formats, runtime.kv_shape, shape, request.max_new_tokens - 1)
    assert cache.rows.lease.limit == promised < request.plan.pages
    assert generation.result().kv.pressure.demotions == 1


def test_the_answer_goes_on_as_if_it_had_been_packed_from_there(runtime: Runtime, tree: Path) -> None:
    """What follows the first token is what a request answers whose image rows were int8 from the start."""
    packed = ask(runtime, Options(formats=Formats("exact", "int8", "int8"), max_new_tokens=30)).result()
    generation = ask(runtime)
    next(generation)
    write(tree, GB)
    next(generation)
    write(tree, 6 * GB)
    result = generation.result()
    assert result.token_ids == packed.token_ids
    assert result.kv.bytes_stored == packed.kv.bytes_stored


def test_the_budget_holds_under_pressure(runtime: Runtime, tree: Path) -> None:
    shape = runtime.prepare([IMAGE], PROMPT, FULL)
    for budget in (shape.plan.peak_bytes, shape.plan.peak_bytes // 2):
        generation = ask(runtime, Options(kv_budget=budget, max_new_tokens=30))
        next(generation)
        write(tree, GB)
        for _ in generation:
            check(runtime, *([] if generation.finish_reason else [generation]))
        kv = generation.result().kv
        assert kv.bytes_stored <= kv.bytes_peak <= budget
        write(tree, 6 * GB)


def test_free_pages_go_back_to_the_system(runtime: Runtime, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All whole pages of a finished request, once; the next one finds them empty, and answers the same."""
    expected = ask(runtime).result()
    rows, back = runtime.debug.rows, list[int]()
    assert rows is not None
    give_back = rows.give_back
    monkeypatch.setattr(rows, "give_back", lambda pages: back.append(give_back(pages)) or back[-1])
    runtime.debug.engine.run_once()
    assert back == []
    write(tree, GB)
    runtime.debug.engine.run_once(), runtime.debug.engine.run_once()
    assert 0.8 * expected.kv.bytes_peak < back[0] <= expected.kv.bytes_peak
    assert not any(back[1:])
    write(tree, 6 * GB)
    assert ask(runtime).result().token_ids == expected.token_ids


@pytest.mark.slow
def test_the_demo_still_reads_the_speed_from_packed_rows(tree: Path) -> None:
    picture, question = ROOT / "examples" / "cockpit.png", "What is the speed?"
    runtime = Runtime.load("demo", threaded=False)
    exact = runtime.generate([picture], question).result()
    packed = runtime.generate([picture], question, Options(formats=Formats("int8", "int8", "int8"))).result()
    runtime.keep_free(RESERVE, root=tree, every_ms=0)
    generation = runtime.generate([picture], question)
    next(generation)
    write(tree, GB)
    next(generation)
    write(tree, 6 * GB)
    result = generation.result()
    assert result.text == packed.text == exact.text == "18 km/h"
    assert result.formats == {"text": "exact", "core": "int8", "secondary": "int8"}
    given = result.kv.pressure.bytes_given_back
    assert 0.4 * exact.kv.bytes_stored < given < 0.6 * exact.kv.bytes_stored
