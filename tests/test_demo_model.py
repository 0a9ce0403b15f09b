"""The demo model's tools: what is drawn is what is said, training can be stopped, the export is transformers' own."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import hear_interrupts
from tools.demo_model import panels, scenes, vocabulary
from tools.demo_model.attention import holds, overlap
from tools.demo_model.camera import as_seen
from tools.demo_model.canvas import GRID, PATCH
from tools.demo_model.data import (
    IGNORE,
    SHOWN,
    Scenes,
    encode,
    head_ids,
    pack,
    piece_labels,
    shown_patches,
    training_questions,
)
from tools.demo_model.evaluate import Answer, held_out, report
from tools.demo_model.facts import Facts
from tools.demo_model.fast import attention, rms_norm
from tools.demo_model.model import DemoModel, ModelConfig, Packing, question_mask
from tools.demo_model.phrases import PATTERNS
from tools.demo_model.questions import ABSENT, KINDS, MAKERS, Question, ask, ask_any
from tools.demo_model.schedule import BadPlan, Stage, parse_plan
from tools.demo_model.tokenizer import load_tokenizer, train_tokenizer

SHIPPED = Path(__file__).parent.parent / "avl_edge" / "demo"
seeds = st.integers(0, 10**9)
quickly = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED / "tokenizer.json")


class TestScenes:
    def test_a_seed_always_gives_the_same_picture(self) -> None:
        first, second = scenes.render(11), scenes.render(11)
        assert first.image.tobytes() == second.image.tobytes()
        assert first.facts == second.facts
        assert (first.text_labels == second.text_labels).all()

    def test_seeds_differ(self) -> None:
        assert scenes.render(1).image.tobytes() != scenes.render(2).image.tobytes()

    @given(seeds)
    @quickly
    def test_facts_need_no_drawing(self, seed: int) -> None:
        assert scenes.facts_of(seed) == scenes.render(seed).facts

    @given(seeds)
    @quickly
    def test_labels_are_in_range(self, seed: int) -> None:
        scene = scenes.render(seed)
        limits = (vocabulary.NUM_CHARACTERS, vocabulary.NUM_FIELDS, vocabulary.NUM_INDICES)
        assert scene.text_labels.shape == (GRID, 2 * GRID, 3)
        assert scene.text_labels.min() >= 0
        assert (scene.text_labels.reshape(-1, 3).max(0) < limits).all()
        assert 0 <= scene.object_labels.min() <= scene.object_labels.max() < vocabulary.NUM_OBJECTS

    @given(seeds)
    @quickly
    def test_the_labels_spell_the_text(self, seed: int) -> None:
        """No character is lost by falling into the half patch of another, or outside the picture."""
        scene = scenes.render(seed)
        for i, line in enumerate(scene.facts.screen or ()):
            assert _spelled(scene, f"screen{i}") == line.replace(" ", "")
        if scene.facts.plate is not None:
            assert _spelled(scene, "plate") == scene.facts.plate

    def test_seed_ranges_are_disjoint(self) -> None:
        ranges = (scenes.TRAINING_SEEDS, scenes.HELD_OUT_SEEDS, scenes.EXAMPLE_SEEDS, scenes.VALIDATION_SEEDS)
        ordered = sorted(ranges, key=lambda r: r.start)
        assert all(a.stop <= b.start for a, b in itertools.pairwise(ordered))

    def test_every_item_is_sometimes_absent(self) -> None:
        facts = [scenes.facts_of(seed) for seed in range(60)]
        for field in fields(Facts):
            present = sum(getattr(f, field.name) is not None for f in facts)
            assert 20 < present < 60, field.name


def _spelled(scene: scenes.Scene, field: str) -> str:
    """The text of ``field`` as the labels have it, in the order of their places in the line."""
    labels = scene.text_labels.reshape(-1, 3)
    found = labels[labels[:, 1] == vocabulary.FIELD_ID[field]]
    return "".join(vocabulary.CHARACTERS[c - 1] for c in found[found[:, 2].argsort()][:, 0])


FACTS = Facts(
    screen=("16:17 WIND", "CALL ANNA", "RADIO 12"),
    sign=(("PARIS", 112), ("LYON", 30)),
    speed=87,
    unit="km/h",
    gear="D",
    fuel=40,
    temperature=-3,
    limit=60,
    light="red",
    lamps=("oil",),
    plate="AB123C",
    cars=("red", "blue", "red"),
)


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


class TestTokenizer:
    @given(seeds)
    @quickly
    def test_answers_survive(self, seed: int) -> None:
        tokenizer = load_tokenizer(SHIPPED / "tokenizer.json")
        facts, rng = scenes.facts_of(seed), random.Random(seed)
        for kind in KINDS:
            answer = ask(facts, kind, rng).answer
            ids = tokenizer.encode(f" {answer}", add_special_tokens=False).ids
            assert tokenizer.decode(ids) == answer

    @given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1))
    @quickly
    def test_any_ascii_survives(self, text: str) -> None:
        tokenizer = load_tokenizer(SHIPPED / "tokenizer.json")
        ids = tokenizer.encode(f" {text}", add_special_tokens=False).ids
        if not any(token in text for token in ("<pad>", "<s>", "</s>", "<image>")):
            assert tokenizer.decode(ids) == text

    def test_numbers_are_spelled_digit_by_digit(self, tokenizer) -> None:
        pieces = tokenizer.encode(" 112 km", add_special_tokens=False).tokens
        assert pieces[1:3] == ["1", "2"]

    def test_training_is_deterministic(self) -> None:
        first, second = (train_tokenizer(pictures=20, vocab_size=320).to_str() for _ in range(2))
        assert first == second

    def test_turn_and_answer_are_encoded_as_in_one_text(self, tokenizer) -> None:
        """Training encodes them apart; inference meets the prompt alone and goes on with the answer's tokens."""
        prompt, answer = encode(Question("speed", "How fast are we?", "87 km/h"), tokenizer)
        whole = tokenizer.encode("\nHow fast are we? ASSISTANT: 87 km/h</s>", add_special_tokens=False).ids
        assert prompt + answer == whole


class TestPacking:
    def test_questions_are_blind_to_each_other_and_restart(self, tokenizer) -> None:
        packed = pack(training_questions(FACTS, random.Random(0)), tokenizer)
        starts = np.flatnonzero((packed.positions == 0) & (packed.segments >= 0))
        assert len(starts) == len(packed.kinds) == packed.segments.max() + 1
        assert (packed.targets[packed.segments < 0] == IGNORE).all()

    def test_the_targets_are_the_answers(self, tokenizer) -> None:
        questions = [ask_any(FACTS, random.Random(i)) for i in range(5)]
        packed = pack(questions, tokenizer)
        for number, question in enumerate(questions):
            own = packed.targets[(packed.segments == number) & (packed.targets != IGNORE)]
            assert tokenizer.decode(own.tolist()) == question.answer


class TestSchedule:
    def test_plans_are_read(self) -> None:
        assert parse_plan("vision:2.5,read:7s") == (Stage("vision", minutes=2.5), Stage("read", steps=7))

    @pytest.mark.parametrize("text", ["sleep:3", "read", "read:"])
    def test_bad_plans_are_named(self, text: str) -> None:
        with pytest.raises(BadPlan):
            parse_plan(text)

    def test_rates_rise_stay_and_fall_to_nothing(self) -> None:
        stage = Stage("vision", steps=100)
        rates = [stage.rate(i / 100) for i in range(101)]
        assert rates[0] < rates[10] == 1.0 == rates[60]
        assert rates[100] == 0.0


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


class TestFast:
    """The written-out gradients are those of PyTorch's own operations."""

    def test_attention(self) -> None:
        q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
        bias = torch.zeros(5, 7, dtype=torch.float64)
        bias[:, 4] = -1e4
        own = attention(q, k, v, bias)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        _same_with_gradients(own, expected, (q, k, v))

    def test_rms_norm(self) -> None:
        x = torch.randn(2, 5, 16, requires_grad=True)
        weight = torch.rand(16, requires_grad=True)
        _same_with_gradients(
            rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (16,), weight, 1e-5), (x, weight)
        )

    def test_a_question_sees_the_picture_and_itself_only(self) -> None:
        mask = question_mask(torch.tensor([[0, 0, 1, -1]]), 3, torch.float32)[0, 0] == 0
        assert mask[:, :3].all()
        assert mask[:3, 3:].tolist() == [
            [True, False, False, False],
            [True, True, False, False],
            [False, False, True, False],
        ]


def _same_with_gradients(own: torch.Tensor, expected: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(own, expected)
    upstream = torch.randn_like(own)
    pairs = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (own, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


def _options(folder: Path, steps: int):
    from tools.demo_model.model import ModelConfig
    from tools.demo_model.trainer import Options

    tiny = ModelConfig(
        vision_width=64, vision_layers=1, vision_heads=1, vision_ff=64, width=64, layers=2, heads=1, ff=64
    )
    plan = (Stage("vision", steps=1), Stage("find", steps=1), Stage("read", steps=steps))
    return Options(folder, plan, batch=1, workers=0, text_length=128, validation=0, config=tiny)


class TestTraining:
    def test_a_resumed_run_gives_the_same_weights(self, tmp_path: Path, tokenizer) -> None:
        from tools.demo_model.trainer import Trainer

        whole, parts = tmp_path / "whole", tmp_path / "parts"
        for folder in (whole, parts):
            folder.mkdir()
            tokenizer.save(str(folder / "tokenizer.json"))
        uninterrupted = Trainer(_options(whole, 2))
        uninterrupted.run()

        stopped = Trainer(_options(parts, 2))
        batches = _step_until(stopped, stage=2, steps=1)
        del batches
        stopped.save()
        resumed = Trainer(_options(parts, 2))
        resumed.resume()
        assert resumed.position.steps == 1
        resumed.run()
        for name, weight in uninterrupted.model.state_dict().items():
            assert torch.equal(weight, resumed.model.state_dict()[name]), name

    @pytest.mark.slow
    def test_ctrl_c_saves_and_stops(self, tmp_path: Path, tokenizer) -> None:
        """A terminal sends it to the whole process group, the worker that draws included."""
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        options = ["--plan", "vision:1000s", "--batch", "1", "--threads", "1", "--folder", str(tmp_path)]
        command = [sys.executable, "-m", "tools.demo_model.train", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_interrupts
        )
        assert process.stdout is not None
        assert '"steps": 20' in process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert 20 <= state["position"]["steps"] < 1000


def _step_until(trainer, stage: int, steps: int) -> None:
    """Run ``trainer`` as ``run`` does, and stop in the middle of ``stage``."""

    class Stopped(Exception):
        pass

    step = trainer.step

    def stopping(batch):
        if (trainer.position.stage, trainer.position.steps) == (stage, steps):
            raise Stopped
        return step(batch)

    trainer.step = stopping
    with pytest.raises(Stopped):
        trainer.run()


class TestExport:
    def test_transformers_gives_the_same_logits(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        from tools.demo_model.export import read_checkpoint, write

        write(read_checkpoint(SHIPPED), SHIPPED / "tokenizer.json", tmp_path / "model")
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
        processor = transformers.LlavaProcessor.from_pretrained(tmp_path / "model", backend="pil")
        own = read_checkpoint(tmp_path / "model")
        image = scenes.render(scenes.EXAMPLE_SEEDS.start + 9).image
        question = Question("speed", "How fast are we?", "87 km/h")
        expected = _transformers_logits(theirs, processor, image, question)
        actual = _own_logits(own, image, question)
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)

    def test_preprocessing_leaves_the_pixels(self) -> None:
        transformers = pytest.importorskip("transformers")
        from tools.demo_model.model import patches

        processor = transformers.LlavaProcessor.from_pretrained(SHIPPED, backend="pil")
        image = scenes.render(3).image
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        own = patches(torch.from_numpy(np.array(image))[None])
        first = pixels[0, :, :PATCH, PATCH : 2 * PATCH].reshape(-1)
        torch.testing.assert_close(own[0, 1], first, atol=1e-5, rtol=0)

    def test_files_are_small_enough_to_ship(self) -> None:
        sizes = [file.stat().st_size for file in SHIPPED.iterdir()]
        assert max(sizes) <= 16 * 2**20
        assert sum(sizes) <= 32 * 2**20


@torch.no_grad()
def _transformers_logits(model, processor, image: Image.Image, question: Question) -> torch.Tensor:
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=f"{prompt} {question.answer}", return_tensors="pt")
    answer = len(processor.tokenizer(f" {question.answer}", add_special_tokens=False).input_ids)
    return model(**inputs).logits[0, -answer - 1 :]


@torch.no_grad()
def _own_logits(model, image: Image.Image, question: Question) -> torch.Tensor:
    from tools.demo_model.model import Packing

    tokenizer = load_tokenizer(SHIPPED / "tokenizer.json")
    packed = pack([question], tokenizer, 64)
    rows = (torch.from_numpy(a)[None] for a in (packed.ids, packed.segments, packed.positions))
    features = model.vision_tower(torch.from_numpy(np.array(image))[None])
    states = model.read(features, torch.tensor([head_ids(tokenizer)]), Packing(*rows), model.all_layers)
    return model.lm_head(states[torch.from_numpy(packed.targets)[None] != IGNORE])


def test_samples_do_not_depend_on_where_a_run_begins() -> None:
    """A resumed run counts from another first scene and must see the same pictures."""
    tokenizer = SHIPPED / "tokenizer.json"
    late, early = Scenes(5, 1, tokenizer)[0], Scenes(3, 3, tokenizer)[2]
    assert all((late[name] == early[name]).all() for name in late)


class TestPatches:
    @quickly
    @given(seeds)
    def test_pieces_are_those_of_the_answer(self, tokenizer, seed: int) -> None:
        """Every token of a plate's answer labels as many half patches as it has letters."""
        scene = scenes.compose(seed, [panels.sample_plate])
        labels = piece_labels(scene.text_labels, tokenizer)
        assert ((labels != IGNORE) == (scene.text_labels[..., 0] > 0)).all()
        assert scene.facts.plate is not None
        pieces = tokenizer.encode(f" {scene.facts.plate}", add_special_tokens=False)
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

    def test_showing_every_patch_is_showing_the_picture(self) -> None:
        torch.manual_seed(0)
        model = DemoModel(ModelConfig(vision_width=32, vision_layers=1, vision_heads=1, width=32, heads=1, layers=2))
        features, rows = torch.randn(2, 576, 32), torch.arange(6).view(2, 3)
        text, head = Packing(rows, torch.zeros_like(rows), rows % 3), torch.tensor([[1, 2]])
        every = torch.arange(576).expand(2, -1)
        expected = model.read(features, head, text, model.all_layers)
        torch.testing.assert_close(model.read(features, head, text, model.all_layers, every), expected)


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


def test_a_camera_changes_the_light_and_not_the_picture() -> None:
    """The same number gives the same picture; strength is what it says; without any the picture is as it was."""
    picture = Image.new("RGB", (336, 336), (128, 128, 128))
    assert as_seen(picture, 0, 1) == picture
    seen = np.asarray(as_seen(picture, 12, 1), dtype=float)
    assert np.array_equal(seen, np.asarray(as_seen(picture, 12, 1)))
    assert not np.array_equal(seen, np.asarray(as_seen(picture, 12, 2)))
    assert abs(seen.mean() - 128) < 0.5
    assert seen.std() == pytest.approx(12 * np.sqrt(1 + 1 / 9), rel=0.05)
    # Within a patch of an image token the light hardly differs, from one to the next it does.
    means = seen.reshape(24, 14, 24, 14, 3).mean((1, 3))
    assert means.std() > 8
