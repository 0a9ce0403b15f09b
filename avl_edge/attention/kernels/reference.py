"""Attention over pool rows in plain torch, by gathering and unpacking each sequence's rows: for any device and dtype.

What the native kernel is held to, and what runs where it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...kv.formats import decode, decode_coarse
from ...kv.layout import UNIT, Format
from .parts import Part, accumulator, check, check_ids, id_limit, record_bytes


def attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: float,
    *,
    scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`attend` in plain torch, by gathering each sequence's rows: for any device and dtype, and the oracle of tests."""
    part = Part("exact", keys, values, rows, offsets)
    out, weights = attend_parts_reference(query, [part], keys.shape[1], scale, scores=scores)
    return out, weights[0] if weights else None


def attend_parts_reference(
    query: Tensor, parts: Sequence[Part], kv_heads: int, scale: float, *, scores: bool = False
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """`attend_parts` in plain torch, by gathering and unpacking each sequence's rows: for any device and dtype."""
    bounds = [check(query, part, kv_heads) for part in parts]
    batch, heads, dim = query.shape
    dtype, device = accumulator(query.dtype), query.device
    for part in parts:
        check_ids(part, kv_heads, dim)
    wide = query.to(dtype).view(batch, kv_heads, heads // kv_heads, dim) * scale
    out = torch.zeros_like(wide)
    weights = tuple(torch.empty(part.rows.numel(), dtype=dtype, device=device) for part in parts)
    for b in range(batch):
        spans = [slice(bound[b], bound[b + 1]) for bound in bounds]
        keys = [_keys(part, span, wide) for part, span in zip(parts, spans, strict=True)]
        if not sum(map(len, keys)):
            continue
        values = [_values(part, span, wide) for part, span in zip(parts, spans, strict=True)]
        softmax = torch.einsum("kgd,rkd->kgr", wide[b], torch.cat(keys)).softmax(-1)
        out[b] = torch.einsum("kgr,rkd->kgd", softmax, torch.cat(values))
        means = torch.split(softmax.mean((0, 1)), [len(each) for each in keys])
        for weight, span, mean in zip(weights, spans, means, strict=True):
            weight[span] = mean
    return out.view(batch, heads, dim).to(query.dtype), weights if scores else None


def coarse_weights_reference(query: Tensor, part: Part, kv_heads: int, scale: float) -> Tensor:
    """`coarse_weights` in plain torch: for any device and dtype."""
    bounds = check(query, part, kv_heads)
    batch, heads, dim = query.shape
    check_ids(part, kv_heads, dim)
    wide = query.to(accumulator(query.dtype)).view(batch, kv_heads, heads // kv_heads, dim) * scale
    weights = torch.empty(part.rows.numel(), dtype=wide.dtype, device=query.device)
    for b, (begin, end) in enumerate(pairwise(bounds)):
        keys = _keys(part, slice(begin, end), wide, coarse=True)
        weights[begin:end] = torch.einsum("kgd,rkd->kgr", wide[b], keys).softmax(-1).mean((0, 1))
    return weights


def _keys(part: Part, span: slice, query: Tensor, *, coarse: bool = False) -> Tensor:
    """The keys of a span of a part's list, [n, H_kv, d], in the dtype of query [B, H_kv, ...].

    `coarse`: int8 keys by their high nibbles alone.
    """
    return _gather(part, part.keys, Format(part.format).keys, span, query, coarse)


def _values(part: Part, span: slice, query: Tensor) -> Tensor:
    return _gather(part, part.values, Format(part.format).values, span, query)


def _gather(part: Part, source: Tensor, form: Format, span: slice, query: Tensor, coarse: bool = False) -> Tensor:
    """The rows of a span of a part's list from one of its arenas, in the format that they have there."""
    kv_heads, dim = query.shape[1], query.shape[3]
    ids = part.rows[span].to(source.device)
    if not len(ids):
        return query.new_empty(0, kv_heads, dim)
    if form.is_exact:
        return source.index_select(0, ids).to(query.dtype)
    every_record = (id_limit(part, kv_heads, dim), record_bytes(form.name, kv_heads, dim)[0])
    records = source.as_strided(every_record, (UNIT, 1)).index_select(0, ids)
    if coarse and form.name == "int8":
        return decode_coarse(records, kv_heads, dim).to(query.dtype)
    return decode(form, records, kv_heads, dim).to(query.dtype)
