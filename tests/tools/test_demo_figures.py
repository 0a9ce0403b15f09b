"""Figures of the demo model: of questions about pictures that it never saw, and of where its attention goes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.equipment.demo_model import quickly
from tools.demo_model import scenes
from tools.demo_model.attention import holds, overlap
from tools.demo_model.evaluate import Answer, held_out, report
from tools.demo_model.questions import Question


class TestEvaluation:
    def test_questions_come_from_held_out_scenes_in_a_fixed_order(self) -> None:
        asked = held_out(seed=5, count=12)
        assert asked == held_out(seed=5, count=12)
        assert all(number in scenes.HELD_OUT_SEEDS for number, _ in asked)
        assert asked != held_out(seed=6, count=12)

    def test_figures(self) -> None:
        answers = [
            Answer(Question("gear", "?", "D"), "D"),
            Answer(Question("gear", "?", "N"), "D"),
            Answer(Question("plate", "?", "AB12"), "AB13"),
        ]
        figures = report(answers)
        assert figures["exact_match"] == pytest.approx(1 / 3, abs=1e-4)
        assert figures["by_type"]["gear"] == {"exact_match": 0.5, "character_error_rate": 0.5, "questions": 2}
        assert figures["by_type"]["plate"]["character_error_rate"] == 0.25


class TestAttentionFigures:
    def test_by_hand(self) -> None:
        scores = np.array([[4, 3, 2, 1, 0, 0, 0, 0, 0, 0], [1] * 10], np.float32)
        # 4 + 3 is 70 % and 4 + 3 + 2 is 90 % of the first row's ten; even attention needs eight of ten.
        assert holds(scores).tolist() == pytest.approx([0.3, 0.8])
        assert overlap(scores[0], scores[0, ::-1].copy(), top=0.4) == 0
        assert overlap(scores[0], np.roll(scores[0], 1), top=0.4) == pytest.approx(0.75)

    @quickly
    @given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9))
    def test_of_random_rows(self, seed: int, top: float) -> None:
        a, b = np.random.default_rng(seed).random((2, 3, 50), np.float32)
        expected = [
            len(set(np.argsort(x)[::-1][: int(top * 50)]) & set(np.argsort(y)[::-1][: int(top * 50)])) / int(top * 50)
            for x, y in zip(a, b, strict=True)
        ]
        assert overlap(a, b, top).tolist() == pytest.approx(expected)
        for row, share in zip(a, holds(a), strict=True):
            count = round(share * 50)
            ordered = sorted(row.astype(float), reverse=True)
            assert sum(ordered[: count - 1]) < 0.8 * sum(ordered) <= sum(ordered[:count]) + 1e-4
