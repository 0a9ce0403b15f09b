"""tools/gpu's figures without a GPU: what is timed is what is said."""

from __future__ import annotations

import torch

from avl_edge.attention.cuda import KernelShape
from tests.equipment.cuda_on_cpu import ReferenceModule
from tests.equipment.host_under_test import HostUnderTest
from tools.gpu import model_speed, numerics, speed


def test_attention_is_timed_over_the_bytes_that_are_said() -> None:
    load = speed.Load(batch=2, selected=20, rows=50, heads=4, kv_heads=2, head_dim=64, layers=2)
    assert load.bytes == 2 * 20 * 2 * 2 * 64 * 2
    row = speed.attention(HostUnderTest(), load, copy=10.0, rounds=2)
    assert row["ms"] > 0
    assert row["torch_full_ms"] > 0
    assert abs(row["gb_per_s"] - load.bytes / 1e6 / row["ms"]) <= 0.06 + 0.01 * row["gb_per_s"]
    assert speed.copy_bandwidth(HostUnderTest(), nbytes=2**20, rounds=2) > 0


def test_enough_layers_that_no_cache_holds_their_rows() -> None:
    for load in (speed.Load(1, 702), speed.Load(16, 2340)):
        larger = speed.beyond_caches(load)
        assert larger.layers * larger.bytes >= 512 * 2**20
        assert larger.layers >= 4


def test_low_rank_rows_are_timed_over_their_bases() -> None:
    load = speed.Load(batch=2, selected=20, rows=50, heads=4, kv_heads=2, head_dim=64, layers=2, format="lowrank:16@5")
    assert load.bytes == 2 * (20 * 2 * 16 + 5 * 2 * 2 * 64 * 2), "five coefficients end within a unit of 16 bytes"
    assert speed.beyond_caches(load) == load
    made: list[ReferenceModule] = []

    def make(shape: KernelShape, dtype: torch.dtype) -> ReferenceModule:
        made.append(ReferenceModule(shape, dtype))
        return made[-1]

    layers = speed.Layers(HostUnderTest(make), load)
    layers.selected()
    assert made[0].launched == ["avl_attend_low_rank", "avl_merge"] * 2
    assert speed.attention(HostUnderTest(), load, copy=10.0, rounds=2)["ms"] > 0


def test_what_is_timed_is_attention_over_the_selected_rows() -> None:
    load = speed.Load(batch=2, selected=20, rows=50, heads=4, kv_heads=2, head_dim=64, layers=1)
    layers = speed.Layers(HostUnderTest(), load)
    layers.selected()
    case = numerics.Case(layers.query, *layers.pools[0], layers.rows, layers.offsets)
    expected, _ = numerics.reference(case)
    assert (layers.out.double() - expected).abs().max() < 2e-3
    chosen = layers.rows.view(2, 20)
    assert all(len(set(rows.tolist())) == 20 for rows in chosen)
    assert chosen[1].min() >= 50, "each sequence has rows of its own"


def test_a_models_steps_are_timed_with_the_bytes_that_they_read() -> None:
    sizes = model_speed.Sizes(layers=2, hidden=128, inner=64, heads=2, vocabulary=50, image=64, steps=12)
    found = model_speed.cases(HostUnderTest(), sizes, batches=(1, 2))
    full, avl = found["cases"][:2]
    assert (full["method"], avl["method"]) == ("full", "avl")
    assert avl["kv_bytes_per_step"] < full["kv_bytes_per_step"]
    assert full["step_ms"] > 0
    pack = found["cases"][5]
    assert (pack["method"], pack["format"]) == ("attentionpack", "exact/lowrank:64/lowrank:64@16")
    assert pack["step_ms"] > 0
    assert found.keys() >= {"full_to_avl_step_at_1", "full_to_avl_step_at_2"}
    weights = model_speed.Model(HostUnderTest(), sizes).bytes
    per_layer = 4 * 128 * 128 + 3 * 128 * 64 + 2 * 128
    assert weights == 2 * (2 * per_layer + 128 + 50 * 128), "decoder and head, without the embedding"
