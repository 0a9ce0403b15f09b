"""Decode steps by the exported decoder, run by ONNX Runtime, against the torch backend's: rows of every format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from avl_edge.attention.cuda import FORMATS
from avl_edge.config import Formats, KvShape
from avl_edge.kv.cache import SequenceCache
from avl_edge.kv.formats import decode, encode
from avl_edge.kv.layout import UNIT, Format
from avl_edge.kv.methods import Avl, Full, Method
from tests.conftest import Checkpoints
from tests.equipment.exported import PRUNE_AFTER, TOLERANCE, Array, Exported, Exports, Layer, prompt_of, start

STEPS = 4
NAMES = st.sampled_from(list(FORMATS))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["llama-mha", "llama-bias", "mistral-yarn", "qwen2-tied"]),
    prune_after=st.sampled_from([None, PRUNE_AFTER]),
    method=st.sampled_from([Full(), Avl(), Avl(prune_layer=0, secondary=30, core=10, text_keep=40, text_floor=1)]),
    prompts=st.lists(
        st.tuples(
            st.integers(1, 40),
            st.integers(1, 40),
            st.integers(0, 2),
            st.one_of(st.just(Formats()), st.builds(Formats, NAMES, NAMES, NAMES)),
        ),
        min_size=1,
        max_size=5,
    ),
    more=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_whole_steps_equal_the_torch_backend(
    export: Exports,
    name: str,
    prune_after: int | None,
    method: Method,
    prompts: list[tuple[int, int, int, Formats]],
    more: int,
    seed: int,
) -> None:
    """Batches of sequences of all lengths, each with rows in formats of its own; parts that nobody uses too."""
    formats = [each for *_, each in prompts]
    used = max(list(FORMATS).index(own) for each in formats for own in each.by_tier().values())
    compared = whole_steps(export(name, prune_after), method, prompts, min(used + more + 1, len(FORMATS)), seed)
    event(f"{used + 1} formats, {compared} of {STEPS} steps rounded alike")


@pytest.mark.parametrize("name", list(FORMATS))
def test_steps_over_packed_rows_are_rounded_alike_as_a_rule(export: Exports, name: str) -> None:
    """So that what is said of steps is said of packed ones too."""
    prompts = [(9, 4, 1, Formats(name, name, name)), (3, 30, 0, Formats(name, name, name))]
    compared = whole_steps(export("llama-mha", None), Full(), prompts, len(FORMATS), seed=1)
    assert compared >= STEPS - 1


@pytest.fixture(scope="module")
def export(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(checkpoint, tmp_path_factory)


def whole_steps(
    exported: Exported, method: Method, prompts: Sequence[tuple[int, int, int, Formats]], parts: int, seed: int
) -> int:
    """Logits, scores of every row that was read, and the new rows, of :data:`STEPS` steps, each of which begins with
    the torch backend's rows; how many of them were compared to their end.

    Two programs in float32 part in the last bits, and where a new row falls between two numbers of its format, such a
    bit decides. What follows from another number is not compared.
    """
    laid_out = [prompt_of(exported, (before, after), n, seed) for before, after, n, _ in prompts]
    random, compared = np.random.default_rng(seed), 0
    backend, recorded, _, caches, _ = start(exported, method, laid_out, STEPS, [formats for *_, formats in prompts])
    for _ in range(STEPS):
        token_ids = random.integers(3, 300, len(caches)).tolist()
        recorded.begin()
        positions = [cache.length + cache.step for cache in caches]
        expected = backend.decode(token_ids, caches).logits.numpy()
        out = exported.decode(exported.repeat(token_ids, positions, recorded, caches, parts))
        for number, layer in enumerate(recorded.layers):
            alike = [_rounded_alike(exported, out, number, layer, b, cache) for b, cache in enumerate(caches)]
            if not all(alike):
                break
            scores = layer.scores(parts)
            np.testing.assert_allclose(out["row_scores"][number, 0, : len(scores)], scores, rtol=1e-3, atol=1e-6)
            assert not out["row_scores"][number, 1].any(), "nobody is asked for sums"
        else:
            np.testing.assert_allclose(out["logits"], expected, rtol=0, atol=TOLERANCE)
            compared += 1
    return compared


def _rounded_alike(
    exported: Exported, out: dict[str, Array], number: int, layer: Layer, b: int, cache: SequenceCache
) -> bool:
    """The new row of a sequence is the torch backend's; of a packed one, whether it has the same record."""
    text, same, name, smoothing = exported.spec.text, True, cache.formats.text, int(cache.rows.smoothing[number])
    rows, offsets, _ = layer.read[name]
    row, form = int(rows[offsets[b + 1] - 1]), Format(name)
    memory = torch.cat([layer.keys, layer.values]).view(torch.uint8).flatten()
    of_values = layer.keys.nbytes
    if form.is_mixed:
        of_values = form.keys.record_bytes(KvShape(1, text.kv_heads, text.head_dim, 4))
    for kind, arena, side, begin in (
        ("key", layer.keys, form.keys, 0),
        ("value", layer.values, form.values, of_values),
    ):
        own = torch.from_numpy(out[f"{kind}.{number}"][b])
        if kind == "key" and smoothing >= 0:
            own = (own - layer.keys[smoothing]) / layer.values[smoothing]
        if name == "exact":
            np.testing.assert_allclose(own, arena[row], rtol=0, atol=2e-5)
            continue
        record = encode(side, own[None])
        stored = memory[begin + UNIT * row :][: record.shape[1]][None]
        ours, theirs = (decode(side, each, text.kv_heads, text.head_dim) for each in (record, stored))
        step = float(own.abs().max()) / (127 if side.name == "int8" else 8)
        assert float((ours - theirs).abs().max()) <= 1.01 * step, "further apart than a number from the next"
        same &= torch.equal(record, stored)
    return same


def test_rows_that_lose_nothing_are_read_alike_exact_and_packed(export: Exports) -> None:
    """In half precision, to the last bit: whole multiples of a scale that is a power of two are the same numbers in
    every format. Of one sequence the columns stand in the same order, too."""
    exported = export("llama-mha", None, torch.float16)
    text, random, each = exported.spec.text, np.random.default_rng(0), 5
    size = (2, text.layers, each, text.kv_heads, text.head_dim)
    row_units = text.kv_heads * text.head_dim * 2 // UNIT
    pools = np.full((2, 2, 2 * text.layers * 3 * each, *size[3:]), np.nan, dtype=np.float16)  # exact rows, and packed
    rows = np.zeros((2, text.layers, 3, each), dtype=np.int32)
    ranges = (("exact", -7, 7, 1 / 4), ("int8", -127, 127, 1 / 64), ("int4", -8, 7, 1 / 4))
    for part, (name, lowest, highest, scale) in enumerate(ranges):
        numbers = random.integers(lowest, highest + 1, size)
        numbers[..., 0] = lowest
        for layer in range(text.layers):
            places = np.arange(each) + each * (part + 3 * layer)
            content = (numbers[:, layer] * scale).astype(np.float16)
            pools[0][:, places] = content
            rows[:, layer, part] = places, places if name == "exact" else places * row_units
            for arena, new in zip(pools[1], content, strict=True):
                stored = torch.from_numpy(new) if name == "exact" else encode(Format(name), torch.from_numpy(new))
                record = stored.flatten(1).view(torch.uint8).numpy()
                arena.view(np.uint8).reshape(len(arena), -1)[places, : record.shape[1]] = record
    results = []
    for parts, own, (keys, values) in zip((1, 3), rows, pools, strict=True):
        slots = np.full((text.layers, parts), -1, dtype=np.int32)  # the token sees itself
        offsets = np.tile(np.linspace(0, 3 * each, parts + 1, dtype=np.int32), (text.layers, 1))
        feeds = exported.step_feeds([7], [3 * each], slots, own.reshape(text.layers, -1), offsets, (keys, values))
        results.append(exported.decode(feeds))
    for name, exact in results[0].items():
        assert np.array_equal(exact, results[1][name]), name
    assert np.isfinite(results[0]["logits"]).all()
    assert results[0]["row_scores"][:, 0].std() > 1e-3
