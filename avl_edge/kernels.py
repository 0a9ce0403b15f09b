"""Attention over pool rows: the decode step that reads selected rows where they lie, and the prompt.

A pool holds one layer's keys and values as rows, [R, H_kv, d] each, or as records of a packed format in an arena of
bytes; a sequence is a list of row ids. Shapes use B for sequences, H for query heads, H_kv for key/value heads (query
head h reads key/value head h // (H // H_kv)), d for the head size and n for the prompt's tokens. Arithmetic is in
float32 for every dtype but float64, which stays float64. Nothing here is meant for gradients.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from . import native
from .config import KvShape
from .layout import UNIT, Format
from .pool.formats import decode, decode_coarse

_NATIVE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_PACKED = ("int8", "int4")


@dataclass(frozen=True)
class Part:
    """Rows of one format that a batch attends.

    Attributes:
        format: "exact", "int8" or "int4".
        keys: exact: [R, H_kv, d] of the query's dtype, any strides while the last dimension is contiguous; packed: the
            arena, uint8 [bytes], contiguous, in which rows are records as :mod:`avl_edge.pool.formats` encodes them.
        values: likewise, as large as the keys.
        rows: [total] int32 on the CPU: row numbers in [0, R), or where records begin, in units of
            :data:`~avl_edge.layout.UNIT` bytes. A row may serve several sequences.
        offsets: [B + 1] int32 on the CPU; sequence b attends rows[offsets[b]:offsets[b + 1]] of this part.
    """

    format: str
    keys: Tensor
    values: Tensor
    rows: Tensor
    offsets: Tensor


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _record_bytes(part: Part, kv_heads: int, dim: int) -> int:
    return Format(part.format).record_bytes(KvShape(1, kv_heads, dim, 1))


def _places(part: Part, kv_heads: int, dim: int) -> int:
    """How many ids a row of this part can have: 0 ... this - 1. A record has to end within its arena."""
    if part.format == "exact":
        return part.keys.shape[0]
    return max(0, (part.keys.numel() - _record_bytes(part, kv_heads, dim)) // UNIT + 1)


def _check(query: Tensor, part: Part, kv_heads: int) -> list[int]:
    """Raise ValueError for arguments that do not fit together; the part's offsets as a list."""
    (batch, heads, dim), keys, values = query.shape, part.keys, part.values
    if part.format == "exact":
        fits = keys.dim() == 3 and keys.shape[1:] == (kv_heads, dim)
    elif part.format in _PACKED:
        fits = keys.dim() == 1 and dim % 2 == 0 and keys.is_contiguous()
        fits = fits and values.is_contiguous()
    else:
        raise ValueError(f"a part is exact, {' or '.join(_PACKED)}, not {part.format!r}")
    if not fits or keys.shape != values.shape or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"query {list(query.shape)} does not fit {part.format} keys {list(keys.shape)}, "
            f"values {list(values.shape)} of {kv_heads} heads"
        )
    dtype = query.dtype if part.format == "exact" else torch.uint8
    if not dtype == keys.dtype == values.dtype:
        raise ValueError(f"query, keys and values are of one dtype, not {query.dtype}, {keys.dtype}, {values.dtype}")
    rows, offsets = part.rows, part.offsets
    if not (rows.dtype == offsets.dtype == torch.int32 and rows.is_cpu and offsets.is_cpu):
        raise ValueError(f"rows and offsets are int32 on the CPU, not {rows.dtype} and {offsets.dtype}")
    bounds: list[int] = offsets.tolist()
    if len(bounds) != batch + 1 or bounds[0] != 0 or bounds[-1] != rows.numel() or bounds != sorted(bounds):
        raise ValueError(f"offsets rise from 0 to the {rows.numel()} rows in {batch} steps, not {bounds}")
    return bounds


def _check_ids(part: Part, kv_heads: int, dim: int) -> None:
    """Raise IndexError where an id of a part leads outside its pool."""
    rows, places = part.rows, _places(part, kv_heads, dim)
    if not rows.numel() or 0 <= int(rows.min()) <= int(rows.max()) < places:
        return
    if part.format == "exact":
        raise IndexError(f"a row id is outside the pool of {places} rows")
    raise IndexError(f"a row id is outside the {part.format} arena of {part.keys.numel()} bytes")


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: float,
    *,
    scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new token per sequence over exact rows: :func:`attend_parts` of one part.

    Args:
        query: [B, H, d], float32, bfloat16, float16 or float64.
        keys, values, rows, offsets: as in an exact :class:`Part`.
        scale: factor of the logits, 1 / sqrt(d) as a rule.
        scores: whether to return the attention that each row received.

    Returns:
        out [B, H, d] and, when asked, the scores [total].

    Raises:
        ValueError, IndexError: as :func:`attend_parts`.
    """
    part = Part("exact", keys, values, rows, offsets)
    out, weights = attend_parts(query, [part], keys.shape[1], scale, scores=scores)
    return out, weights[0] if weights else None


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


def attend_parts(
    query: Tensor, parts: Sequence[Part], kv_heads: int, scale: float, *, scores: bool = False
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Attention of one new token per sequence over the rows of all parts together; nothing is gathered or unpacked.

    Args:
        query: [B, H, d], float32, bfloat16, float16 or float64; packed rows need an even d.
        parts: rows by format, none of which needs to have any for a sequence.
        kv_heads: H_kv, of all parts.
        scale: factor of the logits, 1 / sqrt(d) as a rule.
        scores: whether to return the attention that each row received.

    Returns:
        out [B, H, d] in query's dtype, zeros for a sequence that selects no row; and, when asked, the scores of each
        part [total], float32 (float64 for float64): the softmax weight of each row, averaged over the H heads, 1 in sum
        over all parts per sequence.

    Raises:
        ValueError: shapes, dtypes, formats or offsets do not fit together.
        IndexError: a row id outside its pool. Every call checks every id: next to reading a row it costs nothing.

    A sequence's results are the same, bit for bit, with any number of threads and in any batch.
    """
    if not _is_native(query, parts):
        return attend_parts_reference(query, parts, kv_heads, scale, scores=scores)
    for part in parts:
        _check(query, part, kv_heads)
    out = torch.empty(query.shape, dtype=torch.float32)
    weights = _new_weights(parts) if scores else None
    _run(query, parts, kv_heads, scale, out, weights)
    split = None if weights is None else torch.split(weights, [part.rows.numel() for part in parts])
    return out.to(query.dtype), split


def coarse_weights(query: Tensor, part: Part, kv_heads: int, scale: float) -> Tensor:
    """The softmax weights that a look at the keys alone would give to rows: for choosing which of them to attend.

    Args:
        query: [B, H, d], float32, bfloat16, float16 or float64.
        part: the rows to choose from. Of int8 keys only the scales and the high nibbles are read, half of their bytes;
            of other formats the keys as they are. Values are never read.
        kv_heads: H_kv.
        scale: factor of the logits.

    Returns:
        [total] float32 (float64 for float64): averaged over the H heads, 1 in sum per sequence.

    Raises:
        ValueError, IndexError: as :func:`attend_parts`.

    A sequence's results are the same, bit for bit, with any number of threads and in any batch.
    """
    if not _is_native(query, [part]):
        return coarse_weights_reference(query, part, kv_heads, scale)
    _check(query, part, kv_heads)
    weights = _new_weights([part])
    _run(query, [part], kv_heads, scale, None, weights, coarse=True)
    return weights


def _is_native(query: Tensor, parts: Sequence[Part]) -> bool:
    """Whether the kernel is there, and reads tensors like these."""
    tensors = [query, *(tensor for part in parts for tensor in (part.keys, part.values))]
    if query.dtype not in _NATIVE or not all(tensor.is_cpu for tensor in tensors):
        return False
    return native.core_attention() is not None and all(tensor.stride(-1) == 1 for tensor in tensors[1:])


def _new_weights(parts: Sequence[Part]) -> Tensor:
    return torch.empty(sum(part.rows.numel() for part in parts), dtype=torch.float32)


def _run(
    query: Tensor,
    parts: Sequence[Part],
    kv_heads: int,
    scale: float,
    out: Tensor | None,
    weights: Tensor | None,
    *,
    coarse: bool = False,
) -> None:
    """Call the kernel on arguments that were checked, but for the ids; it fills in `out` and `weights`."""
    function = native.core_attention()
    assert function is not None
    batch, heads, dim = query.shape
    wide = query.float().contiguous()
    # What the kernel is to read has to live until it has: a tensor made contiguous belongs to nobody else.
    lists = [(part.rows.contiguous(), part.offsets.contiguous()) for part in parts]
    described = [_describe(part, *each, kv_heads, dim, coarse) for part, each in zip(parts, lists, strict=True)]
    status = function(
        wide.data_ptr(),
        (native.Part * len(parts))(*described),
        len(parts),
        batch,
        heads,
        kv_heads,
        dim,
        scale,
        torch.get_num_threads(),
        None if out is None else out.data_ptr(),
        None if weights is None else weights.data_ptr(),
    )
    if status == errno.EINVAL:
        for part in parts:
            _check_ids(part, kv_heads, dim)
    if status:
        raise MemoryError("the attention kernel could not allocate its scratch")


def _describe(part: Part, rows: Tensor, offsets: Tensor, kv_heads: int, dim: int, coarse: bool) -> native.Part:
    keys, values = part.keys, part.values
    exact = part.format == "exact"
    name = _NATIVE[keys.dtype] if exact else part.format
    strides = (*keys.stride()[:2], *values.stride()[:2]) if exact else (0, 0, 0, 0)
    return native.Part(
        keys.data_ptr(),
        values.data_ptr(),
        rows.data_ptr(),
        offsets.data_ptr(),
        *strides,
        _places(part, kv_heads, dim),
        native.FORMATS["coarse int8" if coarse and name == "int8" else name],
    )


def attend_parts_reference(
    query: Tensor, parts: Sequence[Part], kv_heads: int, scale: float, *, scores: bool = False
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """`attend_parts` in plain torch, by gathering and unpacking each sequence's rows: for any device and dtype."""
    bounds = [_check(query, part, kv_heads) for part in parts]
    batch, heads, dim = query.shape
    dtype, device = _accumulator(query.dtype), query.device
    for part in parts:
        _check_ids(part, kv_heads, dim)
    wide = query.to(dtype).view(batch, kv_heads, heads // kv_heads, dim) * scale
    out = torch.zeros_like(wide)
    weights = tuple(torch.empty(part.rows.numel(), dtype=dtype, device=device) for part in parts)
    for b in range(batch):
        spans = [slice(bound[b], bound[b + 1]) for bound in bounds]
        keys = [_gather(part, part.keys, span, wide) for part, span in zip(parts, spans, strict=True)]
        if not sum(map(len, keys)):
            continue
        values = [_gather(part, part.values, span, wide) for part, span in zip(parts, spans, strict=True)]
        softmax = torch.einsum("kgd,rkd->kgr", wide[b], torch.cat(keys)).softmax(-1)
        out[b] = torch.einsum("kgr,rkd->kgd", softmax, torch.cat(values))
        means = torch.split(softmax.mean((0, 1)), [len(each) for each in keys])
        for weight, span, mean in zip(weights, spans, means, strict=True):
            weight[span] = mean
    return out.view(batch, heads, dim).to(query.dtype), weights if scores else None


def coarse_weights_reference(query: Tensor, part: Part, kv_heads: int, scale: float) -> Tensor:
    """`coarse_weights` in plain torch: for any device and dtype."""
    bounds = _check(query, part, kv_heads)
    batch, heads, dim = query.shape
    _check_ids(part, kv_heads, dim)
    wide = query.to(_accumulator(query.dtype)).view(batch, kv_heads, heads // kv_heads, dim) * scale
    weights = torch.empty(part.rows.numel(), dtype=wide.dtype, device=query.device)
    for b, (begin, end) in enumerate(pairwise(bounds)):
        keys = _gather(part, part.keys, slice(begin, end), wide, coarse=True)
        weights[begin:end] = torch.einsum("kgd,rkd->kgr", wide[b], keys).softmax(-1).mean((0, 1))
    return weights


def _gather(part: Part, source: Tensor, span: slice, query: Tensor, *, coarse: bool = False) -> Tensor:
    """The rows of a span of a part's list, [n, H_kv, d], from its keys or values, in the dtype of query [B, H_kv, ...].

    `coarse`: int8 rows by their high nibbles alone.
    """
    kv_heads, dim = query.shape[1], query.shape[3]
    ids = part.rows[span].to(source.device)
    if not len(ids):
        return query.new_empty(0, kv_heads, dim)
    if part.format == "exact":
        return source.index_select(0, ids).to(query.dtype)
    every_record = (_places(part, kv_heads, dim), _record_bytes(part, kv_heads, dim))
    records = source.as_strided(every_record, (UNIT, 1)).index_select(0, ids)
    if coarse and part.format == "int8":
        return decode_coarse(records, kv_heads, dim).to(query.dtype)
    return decode(Format(part.format), records, kv_heads, dim).to(query.dtype)


def attend_prompt(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of a prompt's last w tokens, of all as a rule: [H, w, d] from query [H, w, d] and key, value
    [H_kv, n, d], never [n, n].

    The key/value heads become the batch of torch's fused kernel and a group's query heads its heads, so that grouped
    heads share keys and values through a stride of zero: nothing is repeated, and the fused kernel is taken also by
    versions of torch whose `enable_gqa` would fall back to the [n, n] matrix on the CPU.
    """
    if query.dtype == torch.float16 and query.device.type == "cpu":  # the fused kernel adds up in half precision there
        return attend_prompt(query.float(), key.float(), value.float(), scale).half()
    (heads, w, _), (kv_heads, n, dim) = query.shape, key.shape
    group = heads // kv_heads
    # torch's own causal mask lets the first query see the first key: right only where there is a query for every key.
    mask = None if w == n else torch.ones(w, n, dtype=torch.bool, device=key.device).tril(n - w)
    if group == 1:
        return functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None, scale=scale
        )[0]
    shape = (kv_heads, group, n, dim)
    out = functional.scaled_dot_product_attention(
        query.reshape(kv_heads, group, w, dim),
        key[:, None].expand(shape),
        value[:, None].expand(shape),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out.flatten(0, 1)


def value_distances(values: Tensor, is_image: Tensor) -> Tensor:
    """How far each token's value lies from the mean value of the images' tokens: squared, over all heads together.

    Args:
        values: [n, H_kv, d].
        is_image: [n] bool, on the values' device; at least one is true.

    Returns:
        [n], float32 (float64 for float64).
    """
    wide = values.to(_accumulator(values.dtype)).flatten(1)
    return (wide - wide[is_image].mean(0)).square().sum(1)


def prompt_scores(
    query: Tensor, key: Tensor, positions: Tensor, scale: float, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Attention that the prompt's tokens received, after the softmax and averaged over heads.

    Args:
        query: [H, w, d], of the last w tokens, of all as a rule.
        key: [H_kv, n, d], of query's dtype.
        positions: [m] int64, the queries to sum over, each the index of a token from n - w to n - 1; an index given
            twice counts twice.
        scale: factor of the logits.
        chunk: queries taken at once.

    Returns:
        last [n]: the weights of the query at n - 1, whatever `positions` holds; total [n]: the sum over the queries at
        `positions`, each over the keys 0 ... its own index. Both float32 (float64 for float64).

    Goes through one key/value head at a time, with at most `chunk` of its queries: that bounds memory to
    (H // H_kv) * chunk * n weights and one head's keys, far below the H * n * n of the whole matrix.
    """
    (heads, w, dim), (kv_heads, n, _) = query.shape, key.shape
    dtype, device = _accumulator(query.dtype), query.device
    group = heads // kv_heads
    last, total = torch.zeros(2, n, dtype=dtype, device=device)
    positions = positions.to(device)
    index = torch.arange(n, device=device)
    pieces = [*torch.split(positions, chunk), positions.new_tensor([n - 1])]
    for kv, wide_key in ((kv, key[kv].to(dtype)) for kv in range(kv_heads)):
        for i, piece in enumerate(pieces):
            into = last if i == len(pieces) - 1 else total
            queries = query[kv * group : (kv + 1) * group, piece - (n - w)].to(dtype) * scale
            logits = (queries.reshape(-1, dim) @ wide_key.T).view(group, len(piece), n)
            logits.masked_fill_(index > piece[:, None], float("-inf"))
            into += logits.softmax(-1).sum((0, 1))
    return last.div_(heads), total.div_(heads)
