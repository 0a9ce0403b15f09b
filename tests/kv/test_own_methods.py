"""What is ours, against plain definitions: one threshold for all layers, the nucleus, refreshes by drift."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avl_edge.attention.kernels import value_distances
from avl_edge.config import Formats, KvShape, PromptShape
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.cache import SequenceCache
from avl_edge.kv.methods import Avl, Coarse, Distinct, Random
from avl_edge.kv.methods.policy import PromptLayer
from avl_edge.kv.pool import RowPool
from avl_edge.request import ImageSpan
from tests.equipment.settled import settle_policy

PREFIX, IMAGES, SUFFIX = 2, 30, 4
LENGTH = PREFIX + IMAGES + SUFFIX
SHAPE = KvShape(layers=5, kv_heads=2, head_dim=16, itemsize=2)


def _cache(method: Coarse | Distinct | Random) -> SequenceCache:
    plan = kv_plan(method, Formats(), SHAPE, PromptShape(PREFIX, IMAGES, SUFFIX), 3)
    return SequenceCache(RowPool(plan.pages, SHAPE), plan, LENGTH, [ImageSpan("", PREFIX, IMAGES)], SHAPE.layers)


@given(seed=st.integers(0, 10**6), secondary=st.integers(1, 100))
def test_layers_under_one_threshold(seed: int, secondary: int) -> None:
    """Streaming over the layers, within the same rows, ends where sorting all layers at once does."""
    rng = np.random.default_rng(seed)
    distances = rng.random((SHAPE.layers, LENGTH)) ** rng.uniform(0.2, 9, (SHAPE.layers, 1))
    nothing = np.zeros(LENGTH)
    cache = _cache(Coarse(secondary, min(secondary, 40), by_mass=1))
    most = secondary * IMAGES // 100 * SHAPE.layers
    for layer in range(SHAPE.layers):
        cache.store_prompt(layer, nothing, nothing, distances[layer])
        assert sum(len(rows.image_ids) for rows in cache.rows) <= most
        cache.rows.pool.check_integrity([cache.rows])
    rows = []
    for layer in range(SHAPE.layers):
        image = distances[layer, PREFIX : PREFIX + IMAGES]
        for token in range(IMAGES):
            better = image[image > image[token]].sum() / image.sum()
            rows.append((better, layer, token + PREFIX))
    expected = {(layer, position) for _, layer, position in sorted(rows)[:most]}
    stored = {(n, p) for n, each in enumerate(cache.rows) for p in each.image_positions.tolist()}
    assert stored == expected


@given(
    weights=st.lists(st.integers(0, 10**6).map(float), min_size=1, max_size=40),
    mass=st.integers(1, 100),
    core=st.integers(1, 100),
)
def test_the_nucleus_is_the_smallest_set_that_holds_the_share(weights: list[float], mass: int, core: int) -> None:
    policy = Coarse(100, core, mass).policy(PromptShape(1, 40, 1), 1)
    picked = policy.pick_core(np.array(weights))
    cap = core * 40 // 100
    assert picked.sum() <= cap
    chosen = np.array(weights)[picked]
    rest = np.array(weights)[~picked]
    if len(chosen) and len(rest):
        assert chosen.min() >= rest.max()
    if picked.sum() < cap and sum(weights) > 0:
        assert chosen.sum() >= mass / 100 * sum(weights) * (1 - 1e-9)
        assert chosen.sum() - chosen.min() < mass / 100 * sum(weights) * (1 + 1e-9)


@given(weights=st.lists(st.sampled_from([0.0, 1e-30, 1.0]), min_size=1, max_size=40), core=st.integers(1, 100))
def test_all_of_the_mass_takes_as_many_as_may_be(weights: list[float], core: int) -> None:
    picked = Coarse(100, core, 100).policy(PromptShape(1, 40, 1), 1).pick_core(np.array(weights))
    assert picked.sum() == min(core * 40 // 100, len(weights))


def test_a_core_that_lost_its_attention_is_refreshed_on_the_next_step() -> None:
    """From 0.5 to 0.48 the odds fall by 8 %, to 0.4 by 33 %; what counts is the mean of the layers."""
    policy = Avl(100, 100, 50, 0, 100, drift=20).policy(PromptShape(0, IMAGES, SUFFIX), 2)
    is_image = np.arange(IMAGES + SUFFIX) < IMAGES
    last = np.where(is_image, 0.5 / IMAGES * 2, 0.5 / SUFFIX)
    for layer in range(2):
        positions = np.arange(len(last), dtype=np.int32)
        policy.keep_prompt(PromptLayer(layer, positions, is_image, ~is_image, last, last))
    falls = [(0.5, 0.5), (0.48, 0.48), (0.5, 0.4), (0.4, 0.4), (0.6, 0.6), (0.55, 0.55), (0.4, 0.6)]
    refreshed = []
    for step, shares in enumerate(falls, start=1):
        refreshed.append(policy.reads_secondary(step))
        rest = [1 - share for share in shares]
        count, texts = IMAGES if refreshed[-1] else IMAGES // 2, SUFFIX + step
        of_image, of_text = ([[part / n] * n for part in parts] for parts, n in ((shares, count), (rest, texts)))
        settle_policy(policy, step, np.array(of_image), np.array(of_text))
    # Step 3 leaves (1 + .67) / 2 = .83, step 4 .67: step 5 refreshes, on half the rows' share .6: odds .75 of text's.
    assert refreshed == [False, False, False, False, True, False, False]
    assert not policy.reads_secondary(8)


@pytest.mark.parametrize("steps", [1, 12])
def test_without_drift_only_every_kth_step_refreshes(steps: int) -> None:
    policy = Avl(refresh=3).policy(PromptShape(0, IMAGES, SUFFIX), 1)
    assert [policy.reads_secondary(step) for step in range(1, steps + 1)] == [
        step % 3 == 0 for step in range(1, steps + 1)
    ]


@given(seed=st.integers(0, 10**6), heads=st.integers(1, 3), images=st.integers(1, 9))
def test_distances_are_from_the_mean_value_of_the_images(seed: int, heads: int, images: int) -> None:
    values = torch.randn(12, heads, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()
    is_image = torch.zeros(12, dtype=torch.bool)
    is_image[torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:images]] = True
    wide = values.double().numpy().reshape(12, -1)
    expected = np.square(wide - wide[is_image.numpy()].mean(0)).sum(1)
    np.testing.assert_allclose(value_distances(values, is_image).numpy(), expected, rtol=1e-5, atol=1e-5)


@given(
    distances=st.lists(st.integers(0, 9).map(float), min_size=IMAGES, max_size=IMAGES), secondary=st.integers(1, 100)
)
def test_the_rows_that_stand_out_are_stored(distances: list[float], secondary: int) -> None:
    """Whatever attention they get; of equals the first ones; text as it is, though it may stand out more."""
    cache = _cache(Distinct(secondary))
    attention = np.arange(LENGTH, dtype=float)
    far = np.concatenate([np.full(PREFIX, 99.0), distances, np.full(SUFFIX, 99.0)])
    for layer in range(SHAPE.layers):
        cache.store_prompt(layer, attention, attention, far)
    ranked = sorted(range(IMAGES), key=lambda token: (-distances[token], token))
    expected = sorted(PREFIX + token for token in ranked[: secondary * IMAGES // 100])
    for rows in cache.rows:
        assert rows.image_positions.tolist() == expected
        assert len(rows.text_ids) == PREFIX + SUFFIX


@given(secondary=st.integers(1, 100), draw=st.integers(0, 9))
def test_random_rows_are_a_drawing(secondary: int, draw: int) -> None:
    stored = []
    for each in (draw, draw, draw + 1):
        cache = _cache(Random(secondary, each))
        nothing = np.zeros(LENGTH)
        for layer in range(SHAPE.layers):
            cache.store_prompt(layer, nothing, nothing)
        stored.append([rows.image_positions.tolist() for rows in cache.rows])
    assert stored[0] == stored[1]
    assert all(len(each) == secondary * IMAGES // 100 for each in stored[0])
    if 10 <= secondary <= 90:
        assert stored[0] != stored[2]
