"""The figures of an evaluation, worked out by hand or by their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_edge import Runtime
from avl_edge.measure.evaluate import Answer, Asked, Question, Questions, Setting, report
from avl_edge.measure.evaluate.attention import ppci, share_that_holds
from tests.conftest import Checkpoints


def _answer(question: int, setting: Setting, text: str, token_ids: tuple[int, ...], **changes: Any) -> Answer:
    costs = {
        "bytes_stored": 50,
        "bytes_peak": 60,
        "bytes_full": 100,
        "rows_read_fraction": 0.5,
        "bytes_read_fraction": 0.4,
    }
    times = {"prefill_ms": 10.0, "decode_ms_per_token": 2.0}
    fields = {**costs, **times, **changes}
    return Answer(question, setting.method, setting.kv_fraction, {}, text, token_ids, **fields)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> str:
    return str(checkpoint("mistral-gqa"))


@pytest.fixture(scope="module")
def runtime(model: str) -> Runtime:
    return Runtime.open(model)


QUESTIONS = (("red", "colour"), ("12 km", "number"))


class TestReport:
    """Figures worked out by hand."""

    @pytest.fixture
    def rows(self, runtime: Runtime) -> list[dict[str, Any]]:
        items = [Question(f"line {i}", Path(), "?", (text,), kind) for i, (text, kind) in enumerate(QUESTIONS)]
        full, half = Setting("full"), Setting("avl", 0.5)
        answers = {
            full: {0: _answer(0, full, "red", (1, 2, 3)), 1: _answer(1, full, "12 km", (1, 2, 3, 4, 5))},
            half: {
                0: _answer(0, half, "red", (1, 2, 3), bytes_stored=30, rows_read_fraction=0.2),
                1: _answer(1, half, "13", (1, 7, 3), decode_ms_per_token=5.0, rows_read_fraction=0.8, kl_to_full=0.5),
            },
        }
        return report(runtime, Questions("hand", tuple(items), ()), Asked(answers), "exact_match")["results"]

    def test_one_answer_has_no_interval_and_lost_references_are_told(self, runtime: Runtime) -> None:
        full = Setting("full")
        items = tuple(Question(f"line {i}", Path(), "?", ("t-shirt",) * 10) for i in range(2))
        asked = Asked({full: {0: _answer(0, full, "t-shirt", (1,))}})
        document = report(runtime, Questions("hand", items, ()), asked, "vqa_accuracy")
        assert document["results"][0]["score_interval"] is None
        assert document["results"][0]["score"] == 0
        (warning,) = document["warnings"]
        assert "nothing for 't-shirt', the reference of line 0 and 1 more" in warning

    def test_quality(self, rows: list[dict[str, Any]]) -> None:
        full, half = rows
        assert (full["score"], half["score"]) == (1.0, 0.5)
        assert full["score_interval"] == (1.0, 1.0)
        low, high = half["score_interval"]
        assert (low, high) == (0.0, 1.0)  # of two questions both, one or none may be right
        assert half["character_error_rate"] == 4 / 8
        assert half["by_kind"]["number"] == {"questions": 1, "score": 0.0, "character_error_rate": 4 / 5}
        assert "vqa_accuracy" not in half  # one person's answer each
        assert (full["token_identity"], half["token_identity"]) == (1.0, 5 / 8)
        assert (full["kl_to_full"], half["kl_to_full"]) == (None, 0.5)

    def test_cost(self, rows: list[dict[str, Any]]) -> None:
        half = rows[1]
        assert (half["bytes_stored"], half["bytes_stored_fraction"]) == (40, 0.4)
        assert half["ms_per_token"] == (2 * 2 + 2 * 5) / 4
        assert half["rows_read_fraction"] == pytest.approx(0.5)
        assert half["new_tokens"] == 3

    def test_answers_of_one_token_have_no_time_per_token(self, runtime: Runtime) -> None:
        setting = Setting("full")
        asked = Asked({setting: {0: _answer(0, setting, "a", (1,))}})
        (row,) = report(runtime, Questions("hand", (Question("", Path(), "?", ("a",)),), ()), asked, "anls")["results"]
        assert (row["ms_per_token"], row["rows_read_fraction"]) == (None, None)


@given(st.integers(0, 10**6), st.integers(10, 60))
def test_ppci_and_concentration_are_their_definitions(seed: int, count: int) -> None:
    scores = np.random.default_rng(seed).random((2, count))
    best = [set(sorted(range(count), key=lambda i, row=row: (-row[i], i))[: count // 10]) for row in scores]
    assert ppci(scores[0], scores[1], 0.1) == pytest.approx(len(best[0] & best[1]) / (count // 10))
    needed = next(n for n in range(1, count + 1) if sum(sorted(scores[0])[-n:]) >= 0.8 * scores[0].sum())
    assert share_that_holds(scores[0], 0.8) == needed / count
