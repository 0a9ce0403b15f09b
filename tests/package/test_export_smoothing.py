"""Smoothed keys in the exported decoder, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Checkpoints
from tests.equipment.exported import PRUNE_AFTER, TOLERANCE, Array, Exported, Exports, prompt_of
from tests.equipment.pixels import stacked

POOL = 7


@pytest.fixture(scope="module")
def export(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(checkpoint, tmp_path_factory)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.lists(st.integers(-1, POOL - 1), min_size=4, max_size=4), min_size=1, max_size=3),
    prunes=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_smoothing_changes_the_answer_to_a_prompt(
    export: Exports, ids: list[list[int]], prunes: bool, seed: int
) -> None:
    """Any center, any scale, for each sequence and layer its own or none: a constant taken from all keys, and a factor
    that the query has instead. Beside a layer that prunes too; rows that nobody names are NaN."""
    exported, random = export("llama-gqa-full", PRUNE_AFTER if prunes else None), np.random.default_rng(seed)
    ids = ids[:1] if prunes else ids
    prompts = [prompt_of(exported, (9, 5 + number), 1, seed + number) for number in range(len(ids))]
    features = [exported.encode(stacked(each)) for each in prompts]
    feeds = exported.prompt_feeds(prompts, features)
    tokens = len(feeds["token_ids"])
    if prunes:
        feeds["survivors"] = np.array([tokens - 7])
        feeds["pinned"] = (feeds["feature_rows"] < 0).astype(np.int32)
    smoothing = np.repeat(np.array(ids, dtype=np.int32), [len(each) for each in prompts], axis=0).T
    expected = exported.decode(feeds)
    found = exported.decode({**feeds, **_pool(exported, random, ids), "smoothing": np.ascontiguousarray(smoothing)})
    for name in expected.keys() - {"row_scores"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=name)


def _pool(exported: Exported, random: np.random.Generator, ids: Sequence[Sequence[int]]) -> dict[str, Array]:
    """Centers as large as keys and scales in their range, in the rows that are named."""
    text = exported.spec.text
    keys, values = np.full((2, POOL, text.kv_heads, text.head_dim), np.nan, dtype=np.float32)
    used = sorted({row for own in ids for row in own} - {-1})
    keys[used] = random.standard_normal((len(used), *keys.shape[1:])) * 3
    values[used] = random.uniform(1 / 64, 1, (len(used), *keys.shape[1:]))
    return {"pool_keys": keys, "pool_values": values}
