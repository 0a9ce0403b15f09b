"""A request's result: its answer, and what it took in time and memory."""

from __future__ import annotations

from dataclasses import asdict, replace

from ..config import KvShape
from ..kv.cache import SequenceCache
from ..request import KvStats, PressureStats, Result, Timings, Usage
from .requests import Request, Running


def result_of(
    sequence: Running,
    cache: SequenceCache | None,
    reason: str,
    *,
    model: str,
    backend: str,
    shape: KvShape,
    load_ms: float,
    waited_ms: float,
) -> Result:
    """The result of a request that ends now for ``reason``; its ``cache`` still holds its rows."""
    request = sequence.request
    images = sum(span.length for span in request.prompt.spans)
    method, formats = request.plan.method, cache.formats if cache else request.plan.formats
    return Result(
        text=sequence.text,
        token_ids=tuple(sequence.token_ids),
        finish_reason=reason,
        model=model,
        backend=backend,
        method=method.name,
        settings=asdict(method),
        formats=formats.by_tier(),
        usage=Usage(len(request.prompt), images, len(sequence.token_ids)),
        timings=_timings(sequence, load_ms),
        kv=_kv_stats(cache, shape, request, replace(sequence.pressure, waited_ms=waited_ms)),
        device=request.device,
        stop_string=sequence.text_stream.stop_string,
        logprobs=None if request.options.logprobs is None else tuple(sequence.logprobs),
        seed=sequence.sampler.seed,
        notes=request.prompt.notes,
    )


def _timings(sequence: Running, load_ms: float) -> Timings:
    steps = max(len(sequence.token_ids) - 1, 0)
    seconds = sequence.latest_token - sequence.first_token
    return Timings(
        load_ms=load_ms,
        encode_ms=1000 * sequence.encode_seconds,
        prefill_ms=1000 * sequence.prefill_seconds,
        ttft_ms=1000 * max(sequence.first_token - sequence.submitted, 0.0),
        decode_ms_per_token=1000 * seconds / steps if steps else 0.0,
        tokens_per_s=steps / seconds if seconds else 0.0,
    )


def _kv_stats(cache: SequenceCache | None, shape: KvShape, request: Request, pressure: PressureStats) -> KvStats:
    row = shape.row_bytes
    if cache is None:
        return KvStats(0, 0, 0, request.plan.budget, 1.0, 1.0, 0, (), pressure)
    return KvStats(
        bytes_full=(cache.length + cache.step) * shape.layers * row,
        bytes_stored=cache.rows.lease.nbytes,
        bytes_peak=cache.rows.lease.peak * cache.rows.pool.page_bytes,
        bytes_budget=request.plan.budget,
        rows_read_fraction=cache.rows_read / cache.rows_full if cache.rows_full else 1.0,
        bytes_read_fraction=cache.bytes_read / (cache.rows_full * row) if cache.rows_full else 1.0,
        refreshes=cache.refreshes,
        layers=tuple(layer.counts() for layer in cache.rows.layers),
        pressure=pressure,
        bytes_shared=cache.rows.bytes_borrowed,
    )
