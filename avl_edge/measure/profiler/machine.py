"""What the machine does with a model's building blocks, each alone: memory reads, attention, matrices.

Blocks have the shapes of a 7B model's layer cut in half, so that their weights do not stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.kernels import attend, attend_prompt, prompt_scores
from ...machine.profile import Sample
from .timing import repeat

HIDDEN, INNER, HEADS, HEAD_DIM = 2048, 5504, 16, 128
_BATCHES = (1, 2, 4)
_ROWS = (128, 512, 1024, 2048)
_PROMPTS = (256, 512)
_FORMATS = (torch.float32, torch.bfloat16)


def bandwidth(megabytes: int = 256) -> float:
    """Bytes per second of reading memory once, far beyond the caches."""
    data = torch.ones(megabytes * 10**6 // 8, dtype=torch.int64)
    ms, _ = repeat(data.sum)
    return data.nbytes / ms * 1e3


def samples(dtype: torch.dtype, seconds: float) -> Iterator[Sample]:
    """Attention over rows in every format, then matrices and prompt attention in ``dtype``; ``seconds`` for each."""
    for form in _FORMATS if dtype in _FORMATS else (*_FORMATS, dtype):
        yield from attention(form, seconds)
    yield from linear(dtype, seconds)
    yield from prompt_attention(dtype, seconds)


@torch.inference_mode()
def attention(dtype: torch.dtype, seconds: float) -> Iterator[Sample]:
    """Decode attention against rows, batch and format; rows lie scattered over a pool, as they do in use."""
    pool = max(_BATCHES) * max(_ROWS)
    keys, values = (_random(dtype, pool, HEADS, HEAD_DIM) for _ in range(2))
    order = torch.randperm(pool, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    row = 2 * HEADS * HEAD_DIM * dtype.itemsize
    for batch in _BATCHES:
        query = _random(dtype, batch, HEADS, HEAD_DIM)
        for rows in _ROWS:
            offsets = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32)
            ids = order[: batch * rows]
            ms, runs = repeat(lambda q=query, i=ids, o=offsets: attend(q, keys, values, i, o, 0.1), seconds)  # type: ignore[misc]
            amounts = {"decode_us_per_layer": 1.0, "decode_ms_per_gb_of_rows": batch * rows * row / 1e9}
            yield Sample("attention", f"{_name(dtype)}, {rows} rows, batch {batch}", ms, runs, amounts)


@torch.inference_mode()
def linear(dtype: torch.dtype, seconds: float) -> Iterator[Sample]:
    """The matrices of a layer's MLP against tokens: a few read the weights, many compute."""
    matrices = [_random(dtype, INNER, HIDDEN) for _ in range(3)]
    size = sum(matrix.nbytes for matrix in matrices) / 1e9
    for tokens in (*_BATCHES, *_PROMPTS):
        x = _random(dtype, tokens, HIDDEN)
        ms, runs = repeat(lambda x=x: [F.linear(x, matrix) for matrix in matrices], seconds)  # type: ignore[misc]
        phase = "decode" if tokens <= max(_BATCHES) else "prefill"
        flops = 2.0 * tokens * 3 * INNER * HIDDEN / 1e12
        amounts = {f"{phase}_ms_per_gb_of_weights": size, f"{phase}_ms_per_tflop": flops}
        yield Sample("linear", f"{tokens} tokens", ms, runs, amounts)


@torch.inference_mode()
def prompt_attention(dtype: torch.dtype, seconds: float) -> Iterator[Sample]:
    """Prefill's attention against tokens, and the scores of 32 queries."""
    for tokens in _PROMPTS:
        query, key, value = (_random(dtype, HEADS, tokens, HEAD_DIM) for _ in range(3))
        width = HEADS * HEAD_DIM
        ms, runs = repeat(lambda q=query, k=key, v=value: attend_prompt(q, k, v, 0.1), seconds)  # type: ignore[misc]
        yield _prompt_sample("attention", f"prompt of {tokens}", ms, runs, 2.0 * tokens**2 * width)
        last = torch.arange(tokens - 32, tokens)
        ms, runs = repeat(lambda q=query, k=key, w=last: prompt_scores(q, k, w, 0.1), seconds)  # type: ignore[misc]
        yield _prompt_sample("score", f"scores in a prompt of {tokens}", ms, runs, 2.0 * tokens * 33 * width)


def _prompt_sample(kind: str, label: str, ms: float, runs: int, flops: float) -> Sample:
    return Sample("attention", label, ms, runs, {f"prefill_ms_per_{kind}_tflop": flops / 1e12})


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
