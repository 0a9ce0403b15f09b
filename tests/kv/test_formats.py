"""Rows in packed formats: what comes back of one, where its bytes lie, and rows of all formats in one store."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_edge.config import KvShape
from avl_edge.kv.formats import decode, decode_coarse, encode
from avl_edge.kv.layout import PAGE_ROWS, UNIT, Format, groups, page_bytes
from avl_edge.kv.pool import RowPool
from avl_edge.kv.store import RowStore
from tests.equipment import oracle_formats
from tests.equipment.oracle_formats import packed

LEVELS = {"int8": 127, "int4": 8}  # of the largest magnitude
OTHER_END = {"int8": 127, "int4": 7}
LARGEST_SCALE = 65504.0  # of float16

_packed_names = st.sampled_from(sorted(LEVELS))
_shapes = st.builds(KvShape, st.just(2), st.integers(1, 5), st.integers(1, 48).map(lambda half: 2 * half), st.just(2))


def _rows(seed: int, shape: tuple[int, int, int], largest: float) -> Tensor:
    """Normal numbers, each head scaled on its own; one head in four is zero, or has a single value."""
    random_ = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=random_)
    heads = torch.rand(*shape[:2], 1, generator=random_)
    rows = rows / rows.abs().amax() * largest * heads
    rows[heads[..., 0] < 0.125] = 0
    lonely = (heads[..., 0] >= 0.125) & (heads[..., 0] < 0.25)
    rows[lonely] *= torch.arange(shape[2]) == 0
    return rows


def _grouped(rows: Tensor, name: str) -> Tensor:
    """``[n, heads, d]`` with the values that share a scale in the last dimension, float64."""
    size = rows.shape[2] if name == "int8" else math.gcd(rows.shape[2], 32)
    return rows.double().view(*rows.shape[:2], -1, size)


@settings(max_examples=200)
@given(_packed_names, _shapes, st.integers(0, 2**31), st.floats(-12, 6).map(lambda power: 10.0**power))
def test_the_error_is_at_most_half_a_step(name: str, shape: KvShape, seed: int, largest: float) -> None:
    """A value is at most half a scale from what comes back, or a whole one where int4 has no level for it: nearly as
    large as the largest, and of the other sign. The largest may lie beyond what its rounded scale reaches,
    by as many halves of the spacing of float16 numbers as there are levels: more than half a scale only where the scale
    is subnormal."""
    rows = _rows(seed, (6, shape.kv_heads, shape.head_dim), largest)
    back = decode(Format(name), encode(Format(name), rows), shape.kv_heads, shape.head_dim)
    assert back.dtype == torch.float32
    values, found = _grouped(rows, name), _grouped(back, name)
    ideal = values.abs().amax(-1, keepdim=True) / LEVELS[name]
    scales = ideal.float().half().double()  # an fp16 number near the ideal one
    spacing = torch.exp2(torch.floor(torch.log2(ideal.clamp(min=2.0**-14))) - 10)
    signed = torch.where(values.amax(-1, keepdim=True) >= -values.amin(-1, keepdim=True), 1, -1)
    beyond = values * -signed > (OTHER_END[name] + 0.5) * scales * (1 - 1e-4)
    steps = torch.where(beyond, scales * (1 + LEVELS[name] * 2.0**-11), scales / 2)
    rounded = LEVELS[name] * spacing / 2
    reach = torch.where(beyond, steps + rounded, torch.maximum(steps, rounded)) * (1 + 1e-4)
    fits = ideal <= LARGEST_SCALE
    assert bool(((values - found).abs() <= reach)[fits.expand_as(values)].all())
    normal = ideal > 2.0**-14
    assert bool(((values - found).abs() <= steps * (1 + 1e-4))[(fits & normal).expand_as(values)].all())
    assert torch.equal(found == 0, (found == 0) | (values == 0)), "zero stays zero"


@given(_packed_names, _shapes, st.integers(0, 2**31))
def test_what_comes_back_is_what_the_description_says(name: str, shape: KvShape, seed: int) -> None:
    """The same numbers as another program makes of them, bit for bit."""
    rows = _rows(seed, (5, shape.kv_heads, shape.head_dim), 4.0)
    records = encode(Format(name), rows)
    assert torch.equal(
        decode(Format(name), records, shape.kv_heads, shape.head_dim).double(), packed(rows.double(), name)
    )
    if name == "int8":
        coarse_keys = decode_coarse(records, shape.kv_heads, shape.head_dim)
        assert torch.equal(coarse_keys.double(), oracle_formats.coarse(rows.double(), name))


@given(_packed_names, _shapes, st.integers(0, 2**31))
def test_packing_what_was_unpacked_changes_nothing(name: str, shape: KvShape, seed: int) -> None:
    """Rows may be moved any number of times between tiers of one format; only the scale is found anew, and it is the
    same number: the largest value lies at the last level, but for heads so small that their scale is subnormal."""
    rows = _rows(seed, (5, shape.kv_heads, shape.head_dim), 4.0)
    shared = _grouped(rows, name)
    rows[(shared.abs().amax(-1, keepdim=True) < 0.01).expand_as(shared).reshape(rows.shape)] = 0
    once = encode(Format(name), rows)
    back = decode(Format(name), once, shape.kv_heads, shape.head_dim)
    again = decode(Format(name), encode(Format(name), back), shape.kv_heads, shape.head_dim)
    assert torch.equal(again, back)


@given(_shapes, st.integers(0, 2**31))
def test_records_lie_as_documented(shape: KvShape, seed: int) -> None:
    """Scales, then nibbles: byte j of a head's d/2 holds dimension j below and j + d/2 above; of int8 the high nibbles
    of all heads come first. Read here byte by byte."""
    heads, dim = shape.kv_heads, shape.head_dim
    rows = _rows(seed, (3, heads, dim), 4.0)
    whole = lambda count: -(-count // UNIT) * UNIT  # noqa: E731
    for name in LEVELS:
        records = encode(Format(name), rows).numpy()
        assert records.shape == (3, Format(name).record_bytes(shape))
        back = decode(Format(name), torch.from_numpy(records), heads, dim).numpy()
        count = 1 if name == "int8" else groups(dim)
        at = whole(2 * heads * count)
        for row in range(3):
            scales = records[row, : 2 * heads * count].view(np.float16).reshape(heads, count)
            for head in range(heads):
                for j in range(dim):
                    byte = at + head * (dim // 2) + j % (dim // 2)
                    nibble = (int(records[row, byte]) >> (4 if j >= dim // 2 else 0)) & 15
                    q = nibble - 8
                    if name == "int8":
                        low = int(records[row, byte + whole(heads * dim // 2)]) >> (4 if j >= dim // 2 else 0) & 15
                        q = 16 * nibble + low - 128
                    assert back[row, head, j] == np.float32(q) * np.float32(scales[head, j * count // dim])


@pytest.mark.parametrize("name", LEVELS)
def test_zeros_stay_zero_and_huge_values_end_at_the_last_levels(name: str) -> None:
    rows = torch.zeros(1, 2, 4)
    rows[0, 1] = torch.tensor([1e30, -1e30, 1.0, float("inf")])
    back = decode(Format(name), encode(Format(name), rows), 2, 4)
    end, other = LEVELS[name] * LARGEST_SCALE, OTHER_END[name] * LARGEST_SCALE
    assert back.tolist() == [[[0.0] * 4, [end, -other, 0.0, end]]]
    tiny = torch.full((1, 1, 4), 1e-9)
    assert not decode(Format(name), encode(Format(name), tiny), 1, 4).any()


@pytest.mark.parametrize("name", LEVELS)
def test_a_nan_spoils_the_values_of_its_scale_and_no_others(name: str) -> None:
    """What is broken is seen to be broken: it does not come back as a number."""
    rows = _rows(3, (4, 3, 64), 1.0) + 0.5
    clean = decode(Format(name), encode(Format(name), rows), 3, 64)
    rows[1, 2, 40] = float("nan")
    back = decode(Format(name), encode(Format(name), rows), 3, 64)
    spoiled = torch.zeros(4, 3, 64, dtype=torch.bool)
    spoiled[1, 2, 32 if name == "int4" else 0 :] = True
    assert torch.equal(back.isnan(), spoiled)
    assert torch.equal(back[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LEVELS)
def test_every_dtype_packs_alike(name: str, dtype: torch.dtype) -> None:
    rows = _rows(5, (4, 3, 32), 2.0).to(dtype)
    assert torch.equal(encode(Format(name), rows), encode(Format(name), rows.float()))


@settings(max_examples=60)
@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 2**31))
def test_what_is_written_is_read_at_scattered_ids(data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    """Rows of all formats side by side in one store, in pages of their own; each reads back as it would alone."""
    shape = KvShape(1, 2, 16, dtype.itemsize)
    pool = RowPool(13, shape)
    store = RowStore(pool.pages, shape, dtype)
    store.key_bytes.fill_(255)  # numbers that are none
    store.value_bytes.fill_(255)
    lease, chance = pool.lease(pool.pages), np.random.default_rng(seed)
    written = []
    for name in data.draw(st.permutations(["exact", "int8", "int8/int4", "int4"])):
        count = data.draw(st.integers(1, 2 * PAGE_ROWS))
        ids = chance.permutation(pool.allocate(pool.packing(name).rows + count, lease, name))[:count]
        keys, values = (_rows(seed + count + part, (count, 2, 16), 3.0).to(dtype) for part in range(2))
        store.write(torch.from_numpy(ids.astype(np.int64)), keys, values, name)
        written.append((name, ids, keys, values))
    for name, ids, keys, values in written:
        order = chance.permutation(len(ids))
        found = store.read(torch.from_numpy(ids[order].astype(np.int64)), name)
        named = (name.split("/")[0], name.split("/")[-1])
        for rows, back, own in zip((keys, values), found, named, strict=True):
            assert back.dtype == dtype
            assert torch.equal(back, packed(rows.double(), own)[order].to(dtype))
    assert store.nbytes == pool.pages * page_bytes(shape)
