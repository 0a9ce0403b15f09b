"""The demo model's questions: answers are the facts, in many wordings."""

from __future__ import annotations

import random

import pytest
from hypothesis import given

from tests.equipment.demo_model import FACTS, quickly, seeds
from tools.demo_model import vocabulary
from tools.demo_model.facts import Facts
from tools.demo_model.phrases import PATTERNS
from tools.demo_model.questions import ABSENT, KINDS, MAKERS, ask


class TestQuestions:
    @pytest.mark.parametrize(
        ("kind", "answer"),
        [
            ("speed", "87 km/h"),
            ("limit", "60"),
            ("gear", "D"),
            ("fuel", "40%"),
            ("temperature", "-3 C"),
            ("light", "red"),
            ("plate", "AB123C"),
            ("lamps", "oil"),
            ("lamp count", "1"),
            ("car count", "3"),
            ("cars", "red, blue, red"),
            ("compare speed", "yes"),
            ("compare places", "LYON"),
            ("freezing", "yes"),
            ("line count", "3"),
            ("screen", "16:17 WIND, CALL ANNA, RADIO 12"),
            ("sign", "PARIS 112 km, LYON 30 km"),
        ],
    )
    def test_answers_are_the_facts(self, kind: str, answer: str) -> None:
        assert ask(FACTS, kind, random.Random(0)).answer == answer

    @given(seeds)
    @quickly
    def test_answers_follow_from_the_words_of_the_question(self, seed: int) -> None:
        rng = random.Random(seed)
        distance = ask(FACTS, "distance", rng)
        known = [km for place, km in FACTS.sign or () if place in distance.text]
        assert distance.answer == (f"{known[0]} km" if known else ABSENT)
        count = ask(FACTS, "colour count", rng)
        colour = next(c for c in vocabulary.PAINT if c in count.text)
        assert count.answer == str((FACTS.cars or ()).count(colour))

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_empty_scene_shows_nothing(self, kind: str) -> None:
        assert ask(Facts(), kind, random.Random(0)).answer == ABSENT

    @pytest.mark.parametrize("kind", KINDS)
    def test_wordings_vary(self, kind: str) -> None:
        rng = random.Random(0)
        assert len({ask(FACTS, kind, rng).text for _ in range(100)}) >= 15

    def test_every_kind_has_wordings_and_none_is_left_open(self) -> None:
        assert set(PATTERNS) == set(MAKERS)
        rng = random.Random(0)
        for kind in KINDS:
            text = " ".join(ask(FACTS, kind, rng).text for _ in range(50))
            assert not set("{}<>|") & set(text), kind
