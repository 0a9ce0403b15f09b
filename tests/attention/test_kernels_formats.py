"""Attention over rows of several formats, against numpy that unpacks records by itself and sums in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_edge.attention.kernels import Part, attend, attend_parts, attend_parts_reference, coarse_weights
from avl_edge.config import KvShape
from avl_edge.kv.formats import decode, encode
from avl_edge.kv.layout import UNIT, Format
from tests.equipment.decode_attention import ABSOLUTE, RELATIVE, needs_native, offsets_of
from tests.equipment.packed_parts import (
    COUNTS,
    DIMS,
    FORMATS,
    HEADS,
    PACKED,
    expected_of,
    half_steps,
    logit_error,
    side_of,
    store,
    unpacked,
)

ATTENTIONS = [pytest.param(attend_parts, marks=needs_native), attend_parts_reference]


def check(attention: Callable[..., Any], query: Tensor, parts: list[Part], kv_heads: int) -> None:
    dim = query.shape[2]
    out, scores = attention(query, parts, kv_heads, dim**-0.5, scores=True)
    keys = [unpacked(part, part.keys, kv_heads, dim) for part in parts]
    values = [unpacked(part, part.values, kv_heads, dim) for part in parts]
    expected, expected_scores = expected_of(query, keys, values, [part.offsets for part in parts], dim**-0.5)
    assert out.dtype == query.dtype
    torch.testing.assert_close(out.double().numpy(), expected, rtol=RELATIVE[query.dtype], atol=ABSOLUTE)
    assert len(scores) == len(parts)
    for part, score, expected_score in zip(parts, scores, expected_scores, strict=True):
        assert score.dtype == torch.float32
        assert score.shape == part.rows.shape
        torch.testing.assert_close(score.double().numpy(), expected_score, rtol=1e-5, atol=1e-7)
    for b in range(len(query)):
        pieces = [score[part.offsets[b] : part.offsets[b + 1]] for part, score in zip(parts, scores, strict=True)]
        together = torch.cat(pieces).double()
        assert not len(together) or together.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@settings(deadline=None, max_examples=60)
@given(
    formats=st.lists(st.sampled_from(FORMATS), min_size=1, max_size=3),
    batch=st.integers(0, 3),
    heads=HEADS,
    dim=st.sampled_from(DIMS),
    dtype=st.sampled_from(list(RELATIVE)),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_parts_match_float64(
    attention: Callable[..., Any],
    formats: list[str],
    batch: int,
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    torch.manual_seed(seed)
    kv_heads, group = heads
    counts = [data.draw(st.lists(COUNTS, min_size=batch, max_size=batch)) for _ in formats]
    parts = [store(name, each, kv_heads, dim, dtype).part for name, each in zip(formats, counts, strict=True)]
    check(attention, torch.randn(batch, kv_heads * group, dim).to(dtype), parts, kv_heads)


@needs_native
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", PACKED)
def test_every_head_size(name: str, dim: int) -> None:
    parts = [store(name, [129, 61], 4, dim).part, store("exact", [0, 30], 4, dim).part]
    check(attend_parts, torch.randn(2, 8, dim), parts, 4)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", PACKED)
def test_one_row_comes_out_as_it_is_decoded(attention: Callable[..., Any], name: str, dim: int) -> None:
    """All products that unpack a value are exact, so a row that has all the attention is the decoder's, bit for bit."""
    stored = store(name, [1, 0, 1], 3, dim)
    out, scores = attention(torch.randn(3, 6, dim), [stored.part], 3, 1.0, scores=True)
    form = Format(name).values
    rows = decode(form, encode(form, stored.values), 3, dim).repeat_interleave(2, 1)
    assert torch.equal(out, torch.stack([rows[0], torch.zeros_like(rows[0]), rows[1]]))
    assert scores[0].tolist() == [1, 1]


@needs_native
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("names", [["int8"], ["int4"], ["int8/int4"], ["exact", "int8", "int8/int4", "int4"]])
def test_near_the_rows_that_were_stored(names: list[str], dim: int) -> None:
    """With every logit off by at most e, a weight is off by a factor of at most exp(2 e), numerator and denominator.

    The output is off by what the weights are, times the values, and by what the values are: half a step at most.
    """
    query, scale = 0.05 * torch.randn(1, 8, dim), dim**-0.5
    stored = [store(name, [90], 4, dim) for name in names]
    parts, offsets = [each.part for each in stored], [each.part.offsets for each in stored]
    keys, values = (
        [np.asarray(rows.double()) for rows in side] for side in zip(*((s.keys, s.values) for s in stored), strict=True)
    )
    out, scores = attend_parts(query, parts, 4, scale, scores=True)
    expected, expected_scores = expected_of(query, keys, values, offsets, scale)
    magnitude, _ = expected_of(query, keys, [np.abs(each) for each in values], offsets, scale)
    named = list(zip(names, stored, strict=True))
    key_steps = np.concatenate([half_steps(side_of(name), each.keys) for name, each in named])
    value_steps = np.concatenate([half_steps(side_of(name, values=True), each.values) for name, each in named])
    growth = np.exp(2 * logit_error(query[0], key_steps, scale)) - 1
    assert growth.max() < 0.5  # or the bound would say nothing
    bound = value_steps.max(0).repeat(2, 0) + growth[:, None] * magnitude[0] + ABSOLUTE
    assert (np.abs(out[0].double().numpy() - expected[0]) <= bound).all()
    assert scores is not None
    for score, expected_score in zip(scores, expected_scores, strict=True):
        assert (np.abs(score.double().numpy() - expected_score) <= growth.max() * expected_score + 1e-7).all()


@needs_native
@pytest.mark.parametrize(("kv_heads", "dim"), [(8, 128), (4, 64), (3, 80), (5, 96), (3, 20)])
def test_same_bits_in_any_batch_and_with_any_threads(kv_heads: int, dim: int) -> None:
    counts = {
        "exact": [30, 0, 1, 200],
        "int8": [129, 0, 300, 0],
        "int8/int4": [7, 130, 0, 31],
        "int4": [0, 0, 128, 257],
    }
    parts = [store(name, each, kv_heads, dim).part for name, each in counts.items()]
    query, threads = torch.randn(4, 2 * kv_heads, dim), torch.get_num_threads()

    def run(query: Tensor, parts: list[Part]) -> list[Tensor]:
        out, scores = attend_parts(query, parts, kv_heads, 0.1, scores=True)
        assert scores is not None
        assert torch.equal(out, attend_parts(query, parts, kv_heads, 0.1)[0])
        return [out, *scores, *(coarse_weights(query, part, kv_heads, 0.1) for part in parts)]

    try:
        torch.set_num_threads(1)
        together = run(query, parts)
        for number in (2, 3, threads):
            torch.set_num_threads(number)
            assert all(map(torch.equal, together, run(query, parts)))
        for b in range(4):
            spans = [slice(int(part.offsets[b]), int(part.offsets[b + 1])) for part in parts]
            own = [
                replace(part, rows=part.rows[span], offsets=offsets_of([span.stop - span.start]))
                for part, span in zip(parts, spans, strict=True)
            ]
            expected = [together[0][b : b + 1], *(x[span] for x, span in zip(together[1:], spans * 2, strict=True))]
            assert all(map(torch.equal, expected, run(query[b : b + 1], own)))
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_one_exact_part_is_attend() -> None:
    part, query = store("exact", [200, 0, 3], 4, 64, torch.bfloat16).part, torch.randn(3, 8, 64).bfloat16()
    out, scores = attend_parts(query, [part], 4, 0.125, scores=True)
    same, same_scores = attend(query, part.keys, part.values, part.rows, part.offsets, 0.125, scores=True)
    assert torch.equal(out, same)
    assert scores is not None
    assert same_scores is not None
    assert torch.equal(scores[0], same_scores)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_rows_give_zeros(attention: Callable[..., Any]) -> None:
    query = torch.randn(2, 4, 64)
    out, scores = attention(query, [], 4, 1.0, scores=True)
    assert not out.any()
    assert scores == ()
    parts = [store(name, [0, 0], 4, 64).part for name in FORMATS]
    out, scores = attention(query, parts, 4, 1.0, scores=True)
    assert out.shape == query.shape
    assert not out.any()
    assert [len(each) for each in scores] == [0] * len(FORMATS)
    assert attention(query, parts, 4, 1.0)[1] is None


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_broken_scale_is_seen(attention: Callable[..., Any]) -> None:
    stored = store("int4", [4], 2, 64)
    begin = UNIT * int(stored.part.rows[2])
    stored.part.keys[begin : begin + 2] = torch.tensor([math.nan]).half().view(torch.uint8)
    out, _ = attention(torch.ones(1, 2, 64), [stored.part], 2, 1.0)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_records_end_within_the_arena(attention: Callable[..., Any], name: str) -> None:
    query, record = torch.randn(1, 4, 64), Format(name).record_bytes(KvShape(1, 4, 64, 2))
    arena = torch.zeros(3 * record + UNIT - 1, dtype=torch.uint8)

    def run(row: int, size: int) -> Tensor:
        rows = torch.tensor([0, row], dtype=torch.int32)
        good = store("exact", [2], 4, 64).part
        out: Tensor = attention(query, [good, Part(name, arena[:size], arena[:size], rows, offsets_of([2]))], 4, 1.0)[0]
        return out

    last = 2 * record // UNIT
    assert run(last, len(arena)).isfinite().all()
    for row, size in (
        (last + 1, len(arena)),
        (-1, len(arena)),
        (2**31 - 1, len(arena)),
        (last, 3 * record - 1),
        (0, record - 1),
        (0, 0),
    ):
        with pytest.raises(IndexError, match=f"outside the {name} arena of {size} bytes"):
            run(row, size)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_records_of_a_key_and_a_value_end_within_the_memory(attention: Callable[..., Any]) -> None:
    shape, query = KvShape(1, 4, 64, 2), torch.randn(1, 4, 64)
    key, value = Format("int8").record_bytes(shape), Format("int4").record_bytes(shape)
    memory = torch.zeros(3 * (key + value), dtype=torch.uint8)

    def run(row: int, size: int) -> Tensor:
        rows = torch.tensor([0, row], dtype=torch.int32)
        out: Tensor = attention(
            query, [Part("int8/int4", memory[:size], memory[key:size], rows, offsets_of([2]))], 4, 1.0
        )[0]
        return out

    last = 2 * (key + value) // UNIT
    assert run(last, len(memory)).isfinite().all()
    for row, size in ((last + 1, len(memory)), (-1, len(memory)), (last, len(memory) - 1), (0, key)):
        with pytest.raises(IndexError, match=f"outside the int8/int4 arena of {size} bytes"):
            run(row, size)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_arguments_are_checked(attention: Callable[..., Any]) -> None:
    query, part = torch.randn(1, 4, 64), store("int8", [3], 4, 64).part
    for wrong, message in (
        (replace(part, format="lowrank:8"), "exact, int8, int8/int4, int4, not"),
        (replace(part, keys=part.keys.float()), "one dtype"),
        (replace(part, keys=part.keys[:-16]), "does not fit"),
        (replace(part, keys=part.keys.view(-1, 16)), "does not fit"),
        (replace(part, keys=part.keys[::2], values=part.values[::2]), "does not fit"),
        (replace(part, rows=part.rows.long()), "int32"),
        (replace(part, offsets=offsets_of([2])), "offsets rise"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(query, [part, wrong], 4, 1.0)
    for heads in (0, 3, 8):
        with pytest.raises(ValueError, match="does not fit"):
            attention(query, [part], heads, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        attention(query[:, :, :63], [part], 4, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        attention(query, [store("exact", [3], 2, 64).part], 4, 1.0)
