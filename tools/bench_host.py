"""What a decode step asks of the host beside a GPU: rows listed, tables filled, policies settled. Needs no GPU.

    python -m tools.bench_host [--rows 2340] [--steps 48]

Each case is a method with its formats and a batch, at LLaVA-1.5-7B's layers, of prompts with random scores.
``before_ms``: until a step can be launched. ``settle_ms``: what its policies then decide; under full attention while
the device works, under A-VL when its scores have come. Medians over steps, ordinary ones and those on which A-VL picks
its core anew, of the processor time of one thread. Rows that change their format are not converted here, only moved in
the books. ``close``: a sequence of full attention gives its rows back.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from avl_edge.backends.steps import Bucket, Reads, StepTables
from avl_edge.config import Formats, KvShape
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.cache import SequenceCache, prompt_shape
from avl_edge.kv.methods import Avl, Choice, Full
from avl_edge.kv.pool import RowPool, SequenceRows
from avl_edge.kv.selection import StepScores
from avl_edge.request import ImageSpan

PREFIX, SUFFIX = 35, 36
SHAPE = KvShape(layers=32, kv_heads=32, head_dim=128, itemsize=2)
CHOICES = (
    Choice(Full(), Formats()),
    Choice(Avl(), Formats()),
    Choice(Avl(), Formats("exact", "exact", "int4")),
)


class Memory:
    """The host's own, in the place of an accelerator's: tables need no more of one."""

    device = torch.device("cpu")

    def host_memory(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype)


class Batch:
    """Sequences that are decoded together, and what their steps took, in seconds."""

    def __init__(self, choice: Choice, batch: int, rows: int, steps: int) -> None:
        length, spans = PREFIX + rows + SUFFIX, (ImageSpan("", PREFIX, rows),)
        plan = kv_plan(*choice, SHAPE, prompt_shape(length, spans), steps)
        pool = RowPool(batch * plan.pages, SHAPE)
        self._random = np.random.default_rng(0)
        self._caches = [SequenceCache(pool, plan, length, spans, SHAPE.layers) for _ in range(batch)]
        self._tables: dict[Bucket, StepTables] = {}
        self.times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        """Of ordinary steps and of those that pick a core: before the launch, and after it or its scores."""
        for cache in self._caches:
            for layer in range(SHAPE.layers):
                scores = self._random.random(len(cache.positions(layer)))
                cache.store_prompt(layer, scores, scores)
                cache.prune_prompt(layer, scores, scores)

    def step(self) -> None:
        """One step of all sequences, as the backends on a device do it."""
        start = time.thread_time()
        positions, slots = zip(*(cache.begin_step() for cache in self._caches), strict=True)
        reads = [Reads(cache.rows_read_now, cache.formats.text) for cache in self._caches]
        bucket = Bucket.of(reads, any(cache.wants_scores for cache in self._caches))
        listed = time.thread_time()
        if bucket not in self._tables:
            self._tables[bucket] = StepTables(Memory(), SHAPE.layers, bucket)  # type: ignore[arg-type]
        tables, filling = self._tables[bucket], time.thread_time()
        tables.fill([1] * len(reads), positions, np.stack(slots, axis=1), reads)
        before = listed - start + time.thread_time() - filling
        refreshes = any(cache.policy.reads_secondary(cache.step) for cache in self._caches)
        weights = self._random.random((SHAPE.layers, bucket.capacity), dtype=np.float32)
        start = time.thread_time()
        for number, (cache, own) in enumerate(zip(self._caches, reads, strict=True)):
            scores = StepScores(own.rows, np.float32) if cache.wants_scores else None
            if scores:
                scores.give(tables.lists_of(number, own), tables.offsets, weights)
            cache.settle(scores)
        self.times[refreshes].append((before, time.thread_time() - start))


def measure(choice: Choice, batch: int, rows: int, steps: int) -> dict[str, Any]:
    """The times of one case, in milliseconds."""
    running = Batch(choice, batch, rows, steps)
    for _ in range(steps):
        running.step()
    found: dict[str, Any] = {
        "method": choice.method.name,
        "formats": choice.formats.by_tier(),
        "batch": batch,
    }
    for name, times in (("ordinary", running.times[False]), ("refresh", running.times[True])):
        if times:
            before, settled = (round(1000 * median(each), 3) for each in zip(*times, strict=True))
            found[name] = {"before_ms": before, "settle_ms": settled}
    return found


def closing(tokens: int = 32_000, layers: int = 28, rounds: int = 5) -> dict[str, Any]:
    """How long a sequence of so many tokens takes to give its rows back, in milliseconds."""
    shape, times = KvShape(layers, SHAPE.kv_heads, SHAPE.head_dim, SHAPE.itemsize), []
    pool = RowPool(-(-tokens * layers // 16), shape)
    positions = np.arange(tokens, dtype=np.int32)
    for _ in range(rounds):
        rows = SequenceRows(pool, layers, pool.pages)
        for layer in range(layers):
            rows.fill(layer, positions[:100], positions[100:], np.ones(tokens - 100, dtype=np.bool_), 0)
        start = time.thread_time()
        rows.close()
        times.append(time.thread_time() - start)
    return {"tokens": tokens, "layers": layers, "ms": round(1000 * median(times), 3)}


def main(
    rows: Annotated[int, typer.Option(min=1, help="Image rows of each prompt.")] = 2340,
    steps: Annotated[int, typer.Option(min=3, help="Decode steps per case.")] = 48,
) -> None:
    """Time the host's part of decode steps, and print one JSON document."""
    cases = [measure(choice, batch, rows, steps) for batch in (1, 16) for choice in CHOICES]
    print(json.dumps({"cases": cases, "close": closing()}, indent=1))


if __name__ == "__main__":
    typer.run(main)
