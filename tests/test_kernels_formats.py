"""Attention over rows of several formats, against numpy that unpacks records by itself and sums in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_edge import native
from avl_edge.config import KvShape
from avl_edge.kernels import (
    Part,
    attend,
    attend_parts,
    attend_parts_reference,
    coarse_weights,
    coarse_weights_reference,
)
from avl_edge.layout import UNIT, Format, packing, page_bytes
from avl_edge.pool.formats import decode, encode

Array = npt.NDArray[Any]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NATIVE = native.available()
needs_native = pytest.mark.skipif(not NATIVE, reason="the native library is not built: pip install -e .")

PACKED = ["int8", "int4"]
FORMATS = ["exact", *PACKED]
ATTENTIONS = [pytest.param(attend_parts, marks=needs_native), attend_parts_reference]
COARSE = [pytest.param(coarse_weights, marks=needs_native), coarse_weights_reference]
# The oracle sees the query already rounded, and sums are in float32: what a narrow type adds is the rounding of the
# result, half a unit in the last place; a whole one is allowed, for the float32 error that tips a rounding over.
RELATIVE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# Terms of a sum are of size one: where they cancel, the error is relative to them and not to the result.
ABSOLUTE = 1e-5
PAGES = 40


@dataclass(frozen=True)
class Stored:
    """A part as a pool would hold it, and the rows that it was made of, float32 [total, kv_heads, d] in list order."""

    part: Part
    keys: Tensor
    values: Tensor


def offsets_of(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def store(name: str, counts: list[int], kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Stored:
    """Random rows at random places of random pages, with noise in all bytes between them."""
    shape = KvShape(1, kv_heads, dim, dtype.itemsize)
    pack, total = packing(Format(name), shape), sum(counts)
    pages = max(PAGES, -(-total // pack.rows))
    slots = torch.randperm(pages * pack.rows)[:total]
    ids = slots // pack.rows * pack.page_step + slots % pack.rows * pack.row_step
    rows = torch.randn(2, total, kv_heads, dim).to(dtype)
    arenas = []
    for each in rows:
        if pack.format.is_exact:
            arena = torch.full((pages * pack.rows, kv_heads, dim), math.nan, dtype=dtype)
            arena[ids] = each
        else:
            arena = torch.randint(256, (pages * page_bytes(shape) // 2,), dtype=torch.uint8)
            for begin, record in zip((ids * UNIT).tolist(), encode(pack.format, each) if total else [], strict=True):
                arena[begin : begin + len(record)] = record
        arenas.append(arena)
    part = Part(name, arenas[0], arenas[1], ids.int(), offsets_of(counts))
    return Stored(part, rows[0].float(), rows[1].float())


def unpacked(part: Part, source: Tensor, kv_heads: int, dim: int, *, coarse: bool = False) -> Array:
    """The rows that a part lists, float64 [total, kv_heads, d], value by value from the definition of the records."""
    if part.format == "exact":
        rows: Array = source[part.rows.long()].double().numpy()
        return rows
    groups = 1 if part.format == "int8" else dim // math.gcd(dim, 32)
    planes = UNIT * math.ceil(2 * kv_heads * groups / UNIT)
    size, arena = kv_heads * dim // 2, source.numpy()
    head, i = np.indices((kv_heads, dim))
    byte, shift = head * (dim // 2) + i % (dim // 2), 4 * (i // (dim // 2))
    result = np.empty((len(part.rows), kv_heads, dim))
    for row, begin in zip(result, part.rows.tolist(), strict=True):
        record = arena[UNIT * begin :]
        scale = record[: 2 * kv_heads * groups].view(np.float16).astype(float)[head * groups + i * groups // dim]
        first = (record[planes + byte] >> shift & 15).astype(float)
        if part.format == "int4":
            row[:] = (first - 8) * scale
        elif coarse:
            row[:] = (16 * first + 8 - 128) * scale
        else:
            second = record[planes + UNIT * math.ceil(size / UNIT) + byte] >> shift & 15
            row[:] = (16 * first + second - 128) * scale
    return result


def softmax_of(query: Array, keys: Array, scale: float) -> Array:
    """[H, n] of query [H, d] and keys [n, kv_heads, d]."""
    logits: Array = np.einsum("hd,nhd->hn", query, keys.repeat(len(query) // keys.shape[1], 1)) * scale
    exponentials = np.exp(logits - logits.max(1, keepdims=True, initial=-math.inf))
    weights: Array = exponentials / exponentials.sum(1, keepdims=True)
    return weights


def expected_of(
    query: Tensor, keys: list[Array], values: list[Array], offsets: list[Tensor], scale: float
) -> tuple[Array, list[Array]]:
    """Output and the scores of each part, in float64, of rows that are given as [total, kv_heads, d] per part."""
    batch, heads, _ = query.shape
    out, scores = np.zeros(query.shape), [np.full(len(each), math.nan) for each in keys]
    for b in range(batch):
        spans = [slice(int(each[b]), int(each[b + 1])) for each in offsets]
        key = np.concatenate([each[span] for each, span in zip(keys, spans, strict=True)])
        value = np.concatenate([each[span] for each, span in zip(values, spans, strict=True)])
        weights = softmax_of(query[b].double().numpy(), key, scale)
        out[b] = np.einsum("hn,nhd->hd", weights, value.repeat(heads // value.shape[1], 1))
        ends = np.cumsum([span.stop - span.start for span in spans])[:-1]
        for score, span, mean in zip(scores, spans, np.split(weights.mean(0), ends), strict=True):
            score[span] = mean
    return out, scores


def check(attention: Callable[..., Any], query: Tensor, parts: list[Part], kv_heads: int) -> None:
    dim = query.shape[2]
    out, scores = attention(query, parts, kv_heads, dim**-0.5, scores=True)
    both = [[unpacked(part, source, kv_heads, dim) for part in parts for source in (part.keys, part.values)]]
    keys, values = both[0][::2], both[0][1::2]
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


COUNTS = st.one_of(st.sampled_from([0, 1, 3, 4, 5, 16, 127, 128, 129, 257]), st.integers(0, 300))
DIMS = [2, 8, 16, 20, 32, 36, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256, 320]
HEADS = st.sampled_from([(1, 1), (1, 4), (2, 1), (3, 2), (8, 1), (5, 7)])


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
    rows = decode(Format(name), encode(Format(name), stored.values), 3, dim).repeat_interleave(2, 1)
    assert torch.equal(out, torch.stack([rows[0], torch.zeros_like(rows[0]), rows[1]]))
    assert scores[0].tolist() == [1, 1]


@pytest.mark.parametrize("weigh", COARSE)
@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(FORMATS),
    counts=st.lists(COUNTS, max_size=3),
    heads=HEADS,
    dim=st.sampled_from(DIMS),
    dtype=st.sampled_from(list(RELATIVE)),
    seed=st.integers(0, 2**31),
)
def test_coarse_weights_match_float64(
    weigh: Callable[..., Tensor],
    name: str,
    counts: list[int],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    kv_heads, group = heads
    part, query = store(name, counts, kv_heads, dim, dtype).part, torch.randn(len(counts), kv_heads * group, dim)
    weights = weigh(query.to(dtype), part, kv_heads, 0.2)
    keys = unpacked(part, part.keys, kv_heads, dim, coarse=True)
    _, (expected,) = expected_of(query.to(dtype), [keys], [keys], [part.offsets], 0.2)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double().numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weigh", COARSE)
def test_coarse_weights_read_scales_and_high_nibbles_only(weigh: Callable[..., Tensor]) -> None:
    part, query, dim = store("int8", [50, 9], 4, 64).part, torch.randn(2, 8, 64), 64
    weights = weigh(query, part, 4, 0.2)
    keys = part.keys.clone()
    for begin in (part.rows * UNIT).tolist():
        low = begin + Format("int8").record_bytes(KvShape(1, 4, dim, 4)) - 4 * dim // 2
        keys[low : low + 4 * dim // 2] = torch.randint(256, (4 * dim // 2,), dtype=torch.uint8)
    assert not torch.equal(keys, part.keys)
    other = replace(part, keys=keys, values=torch.full_like(part.values, 255))
    assert torch.equal(weights, weigh(query, other, 4, 0.2))
    assert not torch.equal(weights, weigh(2 * query, other, 4, 0.2))


def half_steps(name: str, rows: Tensor) -> Array:
    """How far a value may be from what is stored of it, [n, kv_heads, d]: half a step.

    A step is the largest value of the head, or of the group, over 127 or 7, and rounded to float16, by up to 2^-11 of
    it. The largest value itself may be clamped where its step was rounded down: by 2^-11 of it, less than half a step.
    """
    if name == "exact":
        return np.zeros(rows.shape)
    levels, group = (127, rows.shape[2]) if name == "int8" else (7, math.gcd(rows.shape[2], 32))
    largest = rows.abs().unflatten(2, (-1, group)).amax(-1, keepdim=True).expand(-1, -1, -1, group).flatten(2)
    steps: Array = largest.double().numpy() / levels * (1 + 2**-11) / 2
    return steps


def logit_error(query: Tensor, errors: Array, scale: float) -> Array:
    """How far any logit of a head may be off, [H], where keys are off by errors [n, kv_heads, d]."""
    worst = np.einsum("hd,nhd->hn", query.abs().double().numpy(), errors.repeat(len(query) // errors.shape[1], 1))
    limit: Array = scale * worst.max(1)
    return limit


@needs_native
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("names", [["int8"], ["int4"], ["exact", "int8", "int4"]])
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
    key_steps = np.concatenate([half_steps(name, each.keys) for name, each in zip(names, stored, strict=True)])
    value_steps = np.concatenate([half_steps(name, each.values) for name, each in zip(names, stored, strict=True)])
    growth = np.exp(2 * logit_error(query[0], key_steps, scale)) - 1
    assert growth.max() < 0.5  # or the bound would say nothing
    bound = value_steps.max(0).repeat(2, 0) + growth[:, None] * magnitude[0] + ABSOLUTE
    assert (np.abs(out[0].double().numpy() - expected[0]) <= bound).all()
    assert scores is not None
    for score, expected_score in zip(scores, expected_scores, strict=True):
        assert (np.abs(score.double().numpy() - expected_score) <= growth.max() * expected_score + 1e-7).all()


@needs_native
def test_a_coarse_look_is_within_its_step() -> None:
    """16 values share a high nibble and stand for their middle: at most 8 fine steps away, and half of one more."""
    stored, query = store("int8", [200], 4, 128), 0.05 * torch.randn(1, 8, 128)
    weights = coarse_weights(query, stored.part, 4, 128**-0.5)
    keys = stored.keys.double().numpy()
    _, (expected,) = expected_of(query, [keys], [keys], [stored.part.offsets], 128**-0.5)
    growth = np.exp(2 * logit_error(query[0], 17 * half_steps("int8", stored.keys), 128**-0.5).max()) - 1
    assert growth < 0.5  # or the bound would say nothing
    assert (np.abs(weights.double().numpy() - expected) <= growth * expected + 1e-7).all()


@needs_native
@pytest.mark.parametrize(("kv_heads", "dim"), [(8, 128), (4, 64), (3, 80), (5, 96), (3, 20)])
def test_same_bits_in_any_batch_and_with_any_threads(kv_heads: int, dim: int) -> None:
    counts = {"exact": [30, 0, 1, 200], "int8": [129, 0, 300, 0], "int4": [0, 0, 128, 257]}
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
    assert [len(each) for each in scores] == [0, 0, 0]
    assert attention(query, parts, 4, 1.0)[1] is None


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_broken_scale_is_seen(attention: Callable[..., Any]) -> None:
    stored = store("int4", [4], 2, 64)
    begin = UNIT * int(stored.part.rows[2])
    stored.part.keys[begin : begin + 2] = torch.tensor([math.nan]).half().view(torch.uint8)
    out, _ = attention(torch.ones(1, 2, 64), [stored.part], 2, 1.0)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("name", PACKED)
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


@pytest.mark.parametrize("weigh", COARSE)
def test_coarse_weights_check_ids(weigh: Callable[..., Tensor]) -> None:
    part = store("int8", [3], 4, 64).part
    with pytest.raises(IndexError, match="outside the int8 arena"):
        weigh(torch.randn(1, 4, 64), replace(part, rows=part.rows + len(part.keys) // UNIT), 4, 1.0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_arguments_are_checked(attention: Callable[..., Any]) -> None:
    query, part = torch.randn(1, 4, 64), store("int8", [3], 4, 64).part
    for wrong, message in (
        (replace(part, format="lowrank:8"), "exact, int8 or int4"),
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
