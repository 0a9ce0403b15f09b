"""Image sessions and the pool: budgets, who waits for rows, and short memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from avl_edge import DoesNotFit, Formats, Options, Runtime
from avl_edge.planning.request_planner import PACKED
from tests.conftest import Checkpoints
from tests.equipment.image_sessions import AVL, FIRST, FULL, IMAGES, SECOND, check, is_empty
from tests.equipment.machines import GB, write


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Runtime:
    return Runtime.load(checkpoint("mistral-gqa"), threaded=False)


def test_budgets_are_kept_apart(runtime: Runtime) -> None:
    """The session's is for the picture, which is packed as far as it asks; a question's is for its own rows."""
    exact, half = (runtime.open_images(IMAGES, Options(formats=each)).peak_bytes for each in (Formats(), PACKED[0]))
    found = []
    for budget in (exact, exact - 1, half - 1):
        with runtime.open_images(IMAGES, Options(kv_budget=budget, max_new_tokens=8)) as session:
            kv = session.ask(FIRST).result().kv
            stats = session.stats
            assert stats.bytes_peak <= budget == stats.bytes_budget
            assert kv.bytes_budget is None
            assert kv.bytes_shared == stats.bytes_stored
            found.append(stats.formats["core"])
    assert found == ["exact", "int8", "int8/int4"]
    with pytest.raises(DoesNotFit, match=r"does not hold the \d+ tokens of the session") as refusal:
        runtime.open_images(IMAGES, Options(kv_budget=1000))
    least = _smallest(refusal.value)
    runtime.open_images(IMAGES, Options(kv_budget=least))
    with pytest.raises(DoesNotFit):
        runtime.open_images(IMAGES, Options(kv_budget=least - 1))
    with pytest.raises(DoesNotFit):
        runtime.open_images(IMAGES, Options(kv_budget=least, formats=Formats()))
    session = runtime.open_images(IMAGES)
    with pytest.raises(DoesNotFit, match="tokens of the question and 8 new ones") as refusal:
        session.ask(FIRST, Options(kv_budget=1000, max_new_tokens=8))
    least = _smallest(refusal.value)
    kv = session.ask(FIRST, Options(kv_budget=least, max_new_tokens=8)).result().kv
    assert kv.bytes_peak == least == kv.bytes_budget
    with pytest.raises(DoesNotFit):
        session.ask(FIRST, Options(kv_budget=least - 1, max_new_tokens=8))


def _smallest(refusal: DoesNotFit) -> int:
    found = re.search(r"smallest that would do is .*\((\d+) bytes\)", str(refusal))
    assert found
    return int(found[1])


def test_questions_wait_for_the_pool_and_what_open_sessions_hold_is_refused(checkpoint: Checkpoints) -> None:
    directory = checkpoint("mistral-gqa")
    planned = Runtime.open(directory, threaded=False).open_images(IMAGES[:1], FULL)
    session_bytes, own = planned.peak_bytes, planned.prepare(FIRST).plan.peak_bytes
    runtime = Runtime.load(directory, pool_bytes=session_bytes + own, threaded=False)
    with runtime.open_images(IMAGES[:1], FULL) as session:
        waiting = [session.ask(FIRST) for _ in range(3)]
        assert len({each.result().token_ids for each in waiting}) == 1
        other = runtime.open_images(IMAGES[1:], FULL)
        question, plain = other.ask(FIRST), runtime.generate(IMAGES[:1], FIRST, AVL)
        for each in (question, plain):
            with pytest.raises(DoesNotFit, match="open image sessions hold the rows that this needs"):
                each.result()
        check(runtime)
        assert session.ask(FIRST).result().token_ids == waiting[0].result().token_ids
    assert len(other.ask(FIRST).result().token_ids) == 24
    plain, last = runtime.generate(IMAGES[:1], FIRST, AVL), other.ask(FIRST)
    other.close()
    assert len(plain.result().token_ids) == 24, "once the session's last question, asked later, has freed it"
    assert last.result().finish_reason == "length"
    with pytest.raises(DoesNotFit, match="the whole pool has"):
        runtime.open_images(IMAGES[:1]).ask(FIRST, Options(max_new_tokens=200))
    assert is_empty(runtime)


def test_short_memory_leaves_shared_rows_alone(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A plain request beside them is packed, then nobody is admitted; the session's answers stay what they were."""
    write(tmp_path, 6 * GB)
    runtime = Runtime.load(checkpoint("mistral-gqa"), threaded=False)
    runtime.keep_free(2 * GB, root=tmp_path, every_ms=0)
    session = runtime.open_images(IMAGES[:1], AVL)
    expected = session.ask(SECOND).result()
    question, plain = session.ask(SECOND), runtime.generate(IMAGES[:1], SECOND, FULL)
    next(question), next(plain)
    write(tmp_path, GB)
    result = question.result()
    assert plain.cache is not None
    assert plain.cache.formats.core != "exact"
    assert result.token_ids == expected.token_ids
    assert vars(result.kv.pressure) | {"waited_ms": 0.0} == vars(expected.kv.pressure) | {"waited_ms": 0.0}
    check(runtime, plain)
    late = session.ask(FIRST)
    runtime.debug.engine.run_once()
    assert late.cache is None, "nobody is admitted"
    write(tmp_path, 6 * GB)
    late.result()
