"""What the demo model is trained on: token ids, packed questions, and the patches that are shown."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from avl_edge.model.demo import DEMO
from tests.equipment.demo_model import FACTS, TOKENIZER, quickly, seeds
from tools.demo_model import panels, scenes
from tools.demo_model.canvas import GRID
from tools.demo_model.data import IGNORE, SHOWN, Scenes, encode, pack, piece_labels, shown_patches, training_questions
from tools.demo_model.questions import KINDS, Question, ask, ask_any
from tools.demo_model.tokenizer import train_tokenizer


class TestTokenizer:
    @given(seeds)
    @quickly
    def test_answers_survive(self, seed: int) -> None:
        facts, rng = scenes.facts_of(seed), random.Random(seed)
        for kind in KINDS:
            answer = ask(facts, kind, rng).answer
            ids = TOKENIZER.encode(f" {answer}", add_special_tokens=False).ids
            assert TOKENIZER.decode(ids) == answer

    @given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1))
    @quickly
    def test_any_ascii_survives(self, text: str) -> None:
        ids = TOKENIZER.encode(f" {text}", add_special_tokens=False).ids
        if not any(token in text for token in ("<pad>", "<s>", "</s>", "<image>")):
            assert TOKENIZER.decode(ids) == text

    def test_numbers_are_spelled_digit_by_digit(self) -> None:
        pieces = TOKENIZER.encode(" 112 km", add_special_tokens=False).tokens
        assert pieces[1:3] == ["1", "2"]

    def test_training_is_deterministic(self) -> None:
        first, second = (train_tokenizer(pictures=20, vocab_size=320).to_str() for _ in range(2))
        assert first == second

    def test_turn_and_answer_are_encoded_as_in_one_text(self) -> None:
        """Training encodes them apart; inference meets the prompt alone and goes on with the answer's tokens."""
        prompt, answer = encode(Question("speed", "How fast are we?", "87 km/h"), TOKENIZER)
        whole = TOKENIZER.encode("\nHow fast are we? ASSISTANT: 87 km/h</s>", add_special_tokens=False).ids
        assert prompt + answer == whole


class TestPacking:
    def test_questions_are_blind_to_each_other_and_restart(self) -> None:
        packed = pack(training_questions(FACTS, random.Random(0)), TOKENIZER)
        starts = np.flatnonzero((packed.positions == 0) & (packed.segments >= 0))
        assert len(starts) == len(packed.kinds) == packed.segments.max() + 1
        assert (packed.targets[packed.segments < 0] == IGNORE).all()

    def test_the_targets_are_the_answers(self) -> None:
        questions = [ask_any(FACTS, random.Random(i)) for i in range(5)]
        packed = pack(questions, TOKENIZER)
        for number, question in enumerate(questions):
            own = packed.targets[(packed.segments == number) & (packed.targets != IGNORE)]
            assert TOKENIZER.decode(own.tolist()) == question.answer


class TestPatches:
    @quickly
    @given(seeds)
    def test_pieces_are_those_of_the_answer(self, seed: int) -> None:
        """Every token of a plate's answer labels as many half patches as it has letters."""
        scene = scenes.compose(seed, [panels.sample_plate])
        labels = piece_labels(scene.text_labels, TOKENIZER)
        assert ((labels != IGNORE) == (scene.text_labels[..., 0] > 0)).all()
        assert scene.facts.plate is not None
        pieces = TOKENIZER.encode(f" {scene.facts.plate}", add_special_tokens=False)
        row = labels[labels != IGNORE].tolist()
        expected = [i for i, token in zip(pieces.ids, pieces.tokens, strict=True) for _ in token.removeprefix("Ġ")]
        assert row == expected

    @quickly
    @given(seeds)
    def test_what_is_shown_holds_everything(self, seed: int) -> None:
        scene = scenes.render(seed)
        shown = shown_patches(scene.text_labels, scene.object_labels, random.Random(seed))
        assert len(set(shown.tolist())) == SHOWN
        assert (np.diff(shown) > 0).all()
        written = (scene.text_labels[..., 0] > 0).reshape(GRID, GRID, 2).any(-1) | (scene.object_labels > 0)
        filled = set(np.flatnonzero(written).tolist())
        assert filled <= set(shown.tolist()) or set(shown.tolist()) < filled  # the fullest pictures have more


def test_samples_do_not_depend_on_where_a_run_begins() -> None:
    """A resumed run counts from another first scene and must see the same pictures."""
    tokenizer = DEMO / "tokenizer.json"
    late, early = Scenes(5, 1, tokenizer)[0], Scenes(3, 3, tokenizer)[2]
    assert all((late[name] == early[name]).all() for name in late)
