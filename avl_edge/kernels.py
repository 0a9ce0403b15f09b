"""Attention over pool rows: the decode step that reads selected rows where they lie, and the prompt.

A pool holds one layer's keys and values as rows, [R, H_kv, d] each; a sequence is a list of row ids. Shapes use B for
sequences, H for query heads, H_kv for key/value heads (query head h reads key/value head h // (H // H_kv)), d for the
head size and n for the prompt's tokens. Arithmetic is in float32 for every dtype but float64, which stays float64.
Nothing here is meant for gradients.
"""

from __future__ import annotations

import errno
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from . import native

_ROW_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, offsets: Tensor) -> list[int]:
    """Raise ValueError for arguments that do not fit together; the offsets as a list."""
    batch, heads, dim = query.shape
    if keys.shape != values.shape or keys.dim() != 3 or keys.shape[2] != dim or heads % keys.shape[1]:
        raise ValueError(f"query {list(query.shape)} does not fit keys {list(keys.shape)}, values {list(values.shape)}")
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(f"query, keys and values are of one dtype, not {query.dtype}, {keys.dtype}, {values.dtype}")
    if not (rows.dtype == offsets.dtype == torch.int32 and rows.device.type == offsets.device.type == "cpu"):
        raise ValueError(f"rows and offsets are int32 on the CPU, not {rows.dtype} and {offsets.dtype}")
    bounds: list[int] = offsets.tolist()
    if len(bounds) != batch + 1 or bounds[0] != 0 or bounds[-1] != rows.numel() or bounds != sorted(bounds):
        raise ValueError(f"offsets rise from 0 to the {rows.numel()} rows in {batch} steps, not {bounds}")
    return bounds


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
    """Attention of one new token per sequence over the pool rows selected for it; nothing is gathered or copied.

    Args:
        query: [B, H, d], float32, bfloat16, float16 or float64.
        keys: [R, H_kv, d], the pool, of query's dtype; any strides while the last dimension is contiguous.
        values: [R, H_kv, d], likewise.
        rows: [total] int32 on the CPU, pool row ids in [0, R); a row may serve several sequences.
        offsets: [B + 1] int32 on the CPU; sequence b reads rows[offsets[b]:offsets[b + 1]].
        scale: factor of the logits, 1 / sqrt(d) as a rule.
        scores: whether to return the attention that each row received.

    Returns:
        out [B, H, d] in query's dtype, zeros for a sequence that selects no row; and, when asked, the scores [total],
        float32 (float64 for float64): the softmax weight of each row, averaged over the H heads, 1 in sum per sequence.

    Raises:
        ValueError: shapes, dtypes or offsets do not fit together.
        IndexError: a row id outside the pool. Every call checks every id: next to reading a row it costs nothing.

    A sequence's results are the same, bit for bit, with any number of threads and in any batch.
    """
    row_type = _ROW_TYPES.get(query.dtype)
    on_cpu = query.device.type == keys.device.type == values.device.type == "cpu"
    function = native.core_attention() if on_cpu and row_type is not None else None
    if function is None or keys.stride(-1) != 1 or values.stride(-1) != 1:
        return attend_reference(query, keys, values, rows, offsets, scale, scores=scores)
    _check(query, keys, values, rows, offsets)
    wide, rows, offsets = query.float().contiguous(), rows.contiguous(), offsets.contiguous()
    out = torch.empty_like(wide)
    weights = torch.empty(rows.numel(), dtype=torch.float32) if scores else None
    batch, heads, dim = query.shape
    status = function(
        wide.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        rows.data_ptr(),
        offsets.data_ptr(),
        row_type,
        batch,
        heads,
        keys.shape[1],
        dim,
        keys.shape[0],
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        scale,
        torch.get_num_threads(),
        out.data_ptr(),
        None if weights is None else weights.data_ptr(),
    )
    if status == errno.EINVAL:
        raise IndexError(f"a row id is outside the pool of {keys.shape[0]} rows")
    if status:
        raise MemoryError("the attention kernel could not allocate its scratch")
    return out.to(query.dtype), weights


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
    bounds = _check(query, keys, values, rows, offsets)
    batch, heads, dim = query.shape
    kv_heads, dtype = keys.shape[1], _accumulator(query.dtype)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < keys.shape[0]:
        raise IndexError(f"a row id is outside the pool of {keys.shape[0]} rows")
    wide = query.to(dtype).view(batch, kv_heads, heads // kv_heads, dim) * scale
    out = torch.zeros_like(wide)
    weights = torch.empty(rows.numel(), dtype=dtype, device=query.device) if scores else None
    ids = rows.to(keys.device)
    for b, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        key = keys.index_select(0, ids[begin:end]).to(dtype)
        value = values.index_select(0, ids[begin:end]).to(dtype)
        softmax = torch.einsum("kgd,rkd->kgr", wide[b], key).softmax(-1)
        out[b] = torch.einsum("kgr,rkd->kgd", softmax, value)
        if weights is not None:
            weights[begin:end] = softmax.mean((0, 1))
    return out.view(batch, heads, dim).to(query.dtype), weights


def attend_prompt(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of a whole prompt, [H, n, d] from query [H, n, d] and key, value [H_kv, n, d], never [n, n].

    The key/value heads become the batch of torch's fused kernel and a group's query heads its heads, so that grouped
    heads share keys and values through a stride of zero: nothing is repeated, and the fused kernel is taken also by
    versions of torch whose `enable_gqa` would fall back to the [n, n] matrix on the CPU.
    """
    if query.dtype == torch.float16 and query.device.type == "cpu":  # the fused kernel adds up in half precision there
        return attend_prompt(query.float(), key.float(), value.float(), scale).half()
    kv_heads, n, dim = key.shape
    group = query.shape[0] // kv_heads
    if group == 1:
        return functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale
        )[0]
    shape = (kv_heads, group, n, dim)
    out = functional.scaled_dot_product_attention(
        query.reshape(shape),
        key[:, None].expand(shape),
        value[:, None].expand(shape),
        is_causal=True,
        scale=scale,
    )
    return out.flatten(0, 1)


def prompt_scores(
    query: Tensor, key: Tensor, positions: Tensor, scale: float, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Attention that the prompt's tokens received, after the softmax and averaged over heads.

    Args:
        query: [H, n, d].
        key: [H_kv, n, d], of query's dtype.
        positions: [w] int64, the queries to sum over, each the index of a token; an index given twice counts twice.
        scale: factor of the logits.
        chunk: queries taken at once.

    Returns:
        last [n]: the weights of the query at n - 1, whatever `positions` holds; total [n]: the sum over the queries at
        `positions`, each over the keys 0 ... its own index. Both float32 (float64 for float64).

    Goes through one key/value head at a time, with at most `chunk` of its queries: that bounds memory to
    (H // H_kv) * chunk * n weights and one head's keys, far below the H * n * n of the whole matrix.
    """
    heads, n, dim = query.shape
    kv_heads, dtype, device = key.shape[0], _accumulator(query.dtype), query.device
    group = heads // kv_heads
    last, total = torch.zeros(2, n, dtype=dtype, device=device)
    positions = positions.to(device)
    index = torch.arange(n, device=device)
    pieces = [*torch.split(positions, chunk), positions.new_tensor([n - 1])]
    for kv, wide_key in ((kv, key[kv].to(dtype)) for kv in range(kv_heads)):
        for i, piece in enumerate(pieces):
            into = last if i == len(pieces) - 1 else total
            queries = query[kv * group : (kv + 1) * group, piece].to(dtype) * scale
            logits = (queries.reshape(-1, dim) @ wide_key.T).view(group, len(piece), n)
            logits.masked_fill_(index > piece[:, None], float("-inf"))
            into += logits.softmax(-1).sum((0, 1))
    return last.div_(heads), total.div_(heads)
