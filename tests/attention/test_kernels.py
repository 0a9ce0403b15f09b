"""Decode attention over pool rows against a float64 oracle, and prompt attention against the explicit softmax."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_edge.attention.kernels import attend, attend_prompt, attend_reference, prompt_scores, selected
from tests.equipment.decode_attention import ABSOLUTE, RELATIVE, choose, needs_native, offsets_of, pool
from tests.equipment.processes import run_python


def oracle(query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, offsets: Tensor, scale: float) -> list[Tensor]:
    out, scores = attend_reference(query.double(), keys.double(), values.double(), rows, offsets, scale, scores=True)
    assert scores is not None
    return [out, scores]


def check_against_oracle(query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, offsets: Tensor) -> None:
    scale = query.shape[-1] ** -0.5
    out, scores = attend(query, keys, values, rows, offsets, scale, scores=True)
    expected, expected_scores = oracle(query, keys, values, rows, offsets, scale)
    assert scores is not None
    assert out.dtype == query.dtype
    assert scores.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=RELATIVE[query.dtype], atol=ABSOLUTE)
    torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-5, atol=1e-7)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if end > begin:
            assert scores[begin:end].double().sum().item() == pytest.approx(1, abs=1e-5)


COUNTS = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 5, 15, 16, 17, 127, 128, 129, 255, 256, 257]), st.integers(0, 400))


@needs_native
@settings(deadline=None, max_examples=120)
@given(
    counts=st.lists(COUNTS, max_size=4),
    rows=st.integers(1, 400),
    kv_heads=st.sampled_from([1, 2, 3, 5, 8]),
    group=st.sampled_from([1, 2, 4, 7]),
    dim=st.sampled_from([1, 3, 16, 20, 33, 64, 80, 96, 112, 128, 256]),
    dtype=st.sampled_from(list(RELATIVE)),
    layout=st.sampled_from(["apart", "interleaved", "one layer of several", "by head"]),
    seed=st.integers(0, 2**31),
)
def test_native_matches_float64(
    counts: list[int],
    rows: int,
    kv_heads: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    keys, values = pool(rows, kv_heads, dim, dtype, layout)
    query = torch.randn(len(counts), kv_heads * group, dim).to(dtype)
    check_against_oracle(query, keys, values, choose(rows, counts), offsets_of(counts))


@needs_native
@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("dim", [16, 20, 64, 80, 96, 128, 256])
def test_every_head_size(dim: int, dtype: torch.dtype) -> None:
    keys, values = pool(300, 4, dim, dtype, "apart")
    check_against_oracle(torch.randn(2, 8, dim).to(dtype), keys, values, choose(300, [129, 61]), offsets_of([129, 61]))


@needs_native
def test_non_contiguous_query() -> None:
    keys, values = pool(50, 2, 64, torch.float32, "apart")
    query = torch.randn(64, 4, 3).permute(2, 1, 0)
    check_against_oracle(query, keys, values, choose(50, [20, 0, 9]), offsets_of([20, 0, 9]))


@pytest.mark.parametrize("attention", [attend, attend_reference])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_empty_selection_gives_zeros(
    attention: Callable[..., tuple[Tensor, Tensor | None]], dtype: torch.dtype
) -> None:
    keys, values = pool(10, 2, 64, dtype, "apart")
    query, rows = torch.randn(3, 4, 64).to(dtype), torch.tensor([7], dtype=torch.int32)
    out, scores = attention(query, keys, values, rows, offsets_of([0, 1, 0]), 0.125, scores=True)
    assert out.dtype == dtype
    assert not out[0].any()
    assert not out[2].any()
    torch.testing.assert_close(out[1], values[7].repeat_interleave(2, 0))  # one row has all the attention
    assert scores is not None
    assert scores.tolist() == [1.0]
    out, scores = attention(query, keys, values, rows[:0], offsets_of([0, 0, 0]), 0.125)
    assert not out.any()
    assert scores is None
    out, scores = attention(query[:0], keys, values, rows[:0], offsets_of([]), 0.125, scores=True)
    assert out.shape == (0, 4, 64)
    assert scores is not None
    assert scores.shape == (0,)


def test_float64_stays_float64() -> None:
    keys, values = pool(40, 2, 64, torch.float64, "interleaved")
    query, rows = torch.randn(1, 4, 64, dtype=torch.float64), choose(40, [30])
    out, scores = attend(query, keys, values, rows, offsets_of([30]), 0.125, scores=True)
    picked_keys, picked_values = (x[rows.long()].repeat_interleave(2, 1) for x in (keys, values))
    weights = (torch.einsum("hd,rhd->hr", query[0], picked_keys) * 0.125).softmax(-1)
    torch.testing.assert_close(out[0], torch.einsum("hr,rhd->hd", weights, picked_values), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(scores, weights.mean(0), rtol=1e-13, atol=1e-13)


@needs_native
@pytest.mark.parametrize("dtype", list(RELATIVE))
def test_large_logits(dtype: torch.dtype) -> None:
    """Logits in the tens of thousands: one row has all the attention, the others none, and nothing overflows."""
    keys, values = pool(300, 2, 128, dtype, "apart")
    query = torch.full((1, 4, 128), 20.0, dtype=dtype)
    keys.clamp_(-1, 1)
    keys[123] = 20.0
    rows, offsets = torch.arange(300, dtype=torch.int32), offsets_of([300])
    out, scores = attend(query, keys, values, rows, offsets, 1.0, scores=True)
    torch.testing.assert_close(out[0], values[123].repeat_interleave(2, 0))
    assert scores is not None
    assert scores[123] == 1
    assert scores.sum() == pytest.approx(1)
    out, _ = attend(query, -keys, values, rows, offsets, 1.0)  # all far below zero but one, farther below
    assert out.isfinite().all()
    out, _ = attend(query, keys, values, rows, offsets, -1000.0)
    assert out.isfinite().all()


@needs_native
def test_half_special_values() -> None:
    """Subnormal halves are widened exactly; infinity and NaN stay what they are."""
    keys = torch.zeros(4, 1, 64, dtype=torch.float16)
    values = torch.tensor([2.0**-24, 3 * 2.0**-24, math.inf, math.nan]).half().view(4, 1, 1).repeat(1, 1, 64)
    query = torch.zeros(1, 1, 64, dtype=torch.float16)
    for row in range(4):
        out, _ = attend(query, keys, values, torch.tensor([row], dtype=torch.int32), offsets_of([1]), 1.0)
        torch.testing.assert_close(out[0], values[row], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -0x400000])
def test_a_nan_stays_one_whatever_its_payload(bits: int) -> None:
    """A broken row has to be seen in the answer and in its score, not turned into a weight."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    keys, values, query = torch.zeros(3, 1, 64), torch.ones(3, 1, 64), torch.ones(1, 1, 64)
    keys[1] = nan
    rows, offsets = torch.arange(3, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    out, scores = attend(query, keys, values, rows, offsets, 1.0, scores=True)
    assert out.isnan().all()
    assert scores is not None
    assert scores[1].isnan()


@needs_native
@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize(("kv_heads", "dim"), [(8, 128), (3, 20)])
def test_same_bits_in_any_batch_and_with_any_threads(kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    counts = [300, 0, 1, 127, 128, 129, 40, 513]
    keys, values = pool(600, kv_heads, dim, dtype, "apart")
    query, rows, offsets = torch.randn(8, kv_heads * 2, dim).to(dtype), choose(600, counts), offsets_of(counts)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out, scores = attend(query, keys, values, rows, offsets, 0.1, scores=True)
        assert scores is not None
        for number in (2, 3, threads):
            torch.set_num_threads(number)
            again, again_scores = attend(query, keys, values, rows, offsets, 0.1, scores=True)
            assert torch.equal(out, again)
            assert torch.equal(scores, again_scores)
            assert torch.equal(out, attend(query, keys, values, rows, offsets, 0.1)[0])
        for b, (begin, count) in enumerate(zip(offsets.tolist(), counts, strict=False)):
            alone, alone_scores = attend(
                query[b : b + 1], keys, values, rows[begin : begin + count], offsets_of([count]), 0.1, scores=True
            )
            assert torch.equal(out[b], alone[0])
            assert torch.equal(scores[begin : begin + count], alone_scores)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("attention", [attend, attend_reference])
def test_arguments_are_checked(attention: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    keys, values = pool(10, 2, 64, torch.float32, "apart")
    query, rows = torch.randn(1, 4, 64), torch.arange(4, dtype=torch.int32)
    for row in (-1, 10, 2**31 - 1):
        with pytest.raises(IndexError, match="outside the pool of 10 rows"):
            attention(query, keys, values, torch.tensor([0, row], dtype=torch.int32), offsets_of([2]), 1.0)
    for offsets in ([0, 3], [1, 4], [0, 5], [0], [0, 4, 4]):
        with pytest.raises(ValueError, match="offsets rise"):
            attention(query, keys, values, rows, torch.tensor(offsets, dtype=torch.int32), 1.0)
    with pytest.raises(ValueError, match="offsets rise"):
        attention(query.expand(3, 4, 64), keys, values, rows, torch.tensor([0, 3, 2, 4], dtype=torch.int32), 1.0)
    with pytest.raises(ValueError, match="int32"):
        attention(query, keys, values, rows.long(), offsets_of([4]), 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        attention(query, keys.half(), values, rows, offsets_of([4]), 1.0)
    for wrong in (keys[:9], keys[:, :, :32], keys[:, :1], keys[0]):
        with pytest.raises(ValueError, match="does not fit"):
            attention(query, wrong, values, rows, offsets_of([4]), 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        attention(query[:, :3], keys, values, rows, offsets_of([4]), 1.0)


@needs_native
@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("layout", ["apart", "interleaved", "one layer of several", "by head"])
def test_the_kernel_takes_what_a_pool_holds(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not take the reference computes, without a word and slowly: a pool's rows must not go there."""
    monkeypatch.setattr(selected, "attend_parts_reference", None)
    keys, values = pool(30, 2, 64, dtype, layout)
    query = torch.randn(64, 4, 1).permute(2, 1, 0).to(dtype)
    out, _ = attend(query, keys, values, choose(30, [12]), offsets_of([12]), 0.125)
    assert out.shape == (1, 4, 64)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """Equal logits leave the same weights in any dtype, and sums in the same order: only the rounding is left."""
    bits = torch.randint(-(2**15), 2**15, (3 * 4096,), dtype=torch.int16)
    special = [0, 1, 2, 3, 0x3FF, 0x400, 0x401, 0x7BFF, 0x7C00, 0x7E01, 0x7F7F, 0x7F80, 0x7FC1]
    bits[: len(special)] = torch.tensor(special, dtype=torch.int16)
    values = bits.view(dtype).view(3, 1, 4096)
    query, keys = torch.zeros(1, 1, 4096, dtype=dtype), torch.zeros_like(values)
    for ids in ([0], [0, 1], [1, 2, 2], [0, 1, 2]):
        rows, offsets = torch.tensor(ids, dtype=torch.int32), offsets_of([len(ids)])
        out, _ = attend(query, keys, values, rows, offsets, 1.0)
        wide, _ = attend(query.float(), keys.float(), values.float(), rows, offsets, 1.0)
        torch.testing.assert_close(out, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_native
def test_pool_with_a_strided_last_dimension_goes_through_the_reference() -> None:
    keys, values = (torch.randn(2, 64, 30).permute(2, 0, 1) for _ in range(2))
    check_against_oracle(torch.randn(1, 4, 64), keys, values, choose(30, [12]), offsets_of([12]))


@needs_native
def test_lists_with_strides_go_through_the_reference() -> None:
    keys, values = pool(30, 2, 64, torch.float32, "apart")
    offsets = torch.tensor([0, 9, 6, 9, 12, 9], dtype=torch.int32)
    check_against_oracle(torch.randn(2, 4, 64), keys, values, choose(30, [24])[::2], offsets[::2])


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def causal_softmax(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[H, n, n] in float64."""
    n = query.shape[1]
    logits = query.double() @ key.double().repeat_interleave(len(query) // len(key), 0).mT * scale
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("n", "w"), [(1, 1), (7, 7), (150, 150), (7, 1), (150, 9), (150, 149)])
def test_prompt_attention(n: int, w: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Of all its tokens, and of its last ones alone."""
    query, key, value = (torch.randn(n, h, 64).to(dtype).transpose(0, 1) for h in (heads, kv_heads, kv_heads))
    out = attend_prompt(query[:, n - w :], key, value, 0.125)
    expected = causal_softmax(query, key, 0.125) @ value.double().repeat_interleave(heads // kv_heads, 0)
    expected = expected[:, n - w :]
    assert out.shape == (heads, w, 64)
    assert out.dtype == dtype
    # torch's fused kernel rounds the weights of a narrow type before it multiplies: a unit roundoff of values up to 4.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 90),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    chunk=st.sampled_from([1, 3, 64]),
    data=st.data(),
)
def test_prompt_scores(n: int, kv_heads: int, group: int, dtype: torch.dtype, chunk: int, data: st.DataObject) -> None:
    torch.manual_seed(n)
    query, key = torch.randn(kv_heads * group, n, 20).to(dtype), torch.randn(kv_heads, n, 20).to(dtype)
    first = data.draw(st.integers(0, n - 1))  # of the queries that are run
    positions = data.draw(st.lists(st.integers(first, n - 1), max_size=2 * n))
    last, total = prompt_scores(query[:, first:], key, torch.tensor(positions, dtype=torch.int64), 0.3, chunk)
    weights = causal_softmax(query, key, 0.3).mean(0)
    assert last.dtype == total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(last.double(), weights[-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.double(), weights[positions].sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_prompt_memory_is_linear() -> None:
    """With 8,192 tokens the matrix of one head takes 64 MiB in booleans, 256 MiB in float32; 24 MiB hold all this."""
    run_python(
        """
        import torch
        from avl_edge.attention.kernels import attend_prompt, prompt_scores
        def peak():
            return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
        def work(n, dtype, kv_heads):
            query, key = torch.ones(2, n, 16, dtype=dtype), torch.ones(kv_heads, n, 16, dtype=dtype)
            attend_prompt(query, key, key, 0.25)
            attend_prompt(query[:, -64:], key, key, 0.25)
            prompt_scores(query, key, torch.arange(n - 64, n), 0.25, chunk=32)
        cases = [(d, k) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16) for k in (1, 2)]
        with torch.inference_mode():
            for dtype, kv_heads in cases:
                work(128, dtype, kv_heads)
            before = peak()
            for dtype, kv_heads in cases:
                work(8192, dtype, kv_heads)
                assert peak() - before < 24, (dtype, kv_heads, peak() - before)
        """
    )
