"""The demo model's pictures: what is drawn is what is said and labelled."""

from __future__ import annotations

import itertools
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from tests.equipment.demo_model import quickly, seeds
from tools.demo_model import scenes, vocabulary
from tools.demo_model.camera import as_seen
from tools.demo_model.canvas import GRID
from tools.demo_model.facts import Facts


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
