"""A prompt's attention, and what its policies want to know of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .parts import accumulator


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
    wide = values.to(accumulator(values.dtype)).flatten(1)
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
    dtype, device = accumulator(query.dtype), query.device
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
