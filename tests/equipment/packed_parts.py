"""Shared by the tests of attention over packed rows: parts as a pool holds them, unpacked, summed in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor

from avl_edge.attention.kernels import Part
from avl_edge.config import KvShape
from avl_edge.kv.formats import encode
from avl_edge.kv.layout import UNIT, Format, packing, page_bytes
from tests.equipment.decode_attention import offsets_of

Array = npt.NDArray[Any]

PACKED = ["int8", "int8/int4", "int4"]
FORMATS = ["exact", *PACKED]
PAGES = 40

COUNTS = st.one_of(st.sampled_from([0, 1, 3, 4, 5, 16, 127, 128, 129, 257]), st.integers(0, 300))
DIMS = [2, 8, 16, 20, 32, 36, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256, 320]
HEADS = st.sampled_from([(1, 1), (1, 4), (2, 1), (3, 2), (8, 1), (5, 7)])


@dataclass(frozen=True)
class Stored:
    """A part as a pool would hold it, and the rows that it was made of, float32 [total, kv_heads, d] in list order."""

    part: Part
    keys: Tensor
    values: Tensor


def store(name: str, counts: list[int], kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Stored:
    """Random rows at random places of random pages, with noise in all bytes between them."""
    form, total = Format(name), sum(counts)
    shape = KvShape(1, kv_heads, dim, 8)  # of which a packed row is always smaller
    pages = max(PAGES, -(-total // packing(form, shape).rows))
    pack = packing(form, shape, pages)
    slots = torch.randperm(pages * pack.rows)[:total].numpy()
    ids = torch.from_numpy(pack.ids(*np.divmod(slots, pack.rows)))
    rows = torch.randn(2, total, kv_heads, dim).to(dtype)
    if form.is_exact:
        keys, values = torch.full((2, pages * pack.rows, kv_heads, dim), math.nan, dtype=dtype)
        keys[ids], values[ids] = rows
    else:
        memory = torch.randint(256, (pages * page_bytes(shape),), dtype=torch.uint8)
        keys, values = memory, memory[form.keys.record_bytes(shape) :]
        if not form.is_mixed:
            keys, values = memory.chunk(2)
        for arena, each, new in zip((keys, values), (form.keys, form.values), rows, strict=True):
            for begin, record in zip((ids * UNIT).tolist(), encode(each, new) if total else [], strict=True):
                arena[begin : begin + len(record)] = record
    return Stored(Part(name, keys, values, ids.int(), offsets_of(counts)), rows[0].float(), rows[1].float())


def side_of(name: str, *, values: bool = False) -> str:
    """What keys, or values, are stored in."""
    return name.split("/")[-1 if values else 0]


def unpacked(part: Part, source: Tensor, kv_heads: int, dim: int, *, coarse: bool = False) -> Array:
    """The rows that a part lists, float64 [total, kv_heads, d], value by value from the definition of the records."""
    if part.format == "exact":
        rows: Array = source[part.rows.long()].double().numpy()
        return rows
    name = side_of(part.format, values=source is part.values)
    groups = 1 if name == "int8" else dim // math.gcd(dim, 32)
    planes = UNIT * math.ceil(2 * kv_heads * groups / UNIT)
    size, arena = kv_heads * dim // 2, source.numpy()
    head, i = np.indices((kv_heads, dim))
    byte, shift = head * (dim // 2) + i % (dim // 2), 4 * (i // (dim // 2))
    result = np.empty((len(part.rows), kv_heads, dim))
    for row, begin in zip(result, part.rows.tolist(), strict=True):
        record = arena[UNIT * begin :]
        scale = record[: 2 * kv_heads * groups].view(np.float16).astype(float)[head * groups + i * groups // dim]
        first = (record[planes + byte] >> shift & 15).astype(float)
        if name == "int4":
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


def half_steps(name: str, rows: Tensor) -> Array:
    """How far a value may be from what int8 or int4 stores of it, [n, kv_heads, d]: half a step.

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
