"""What a decode step asks of the host beside a GPU: rows listed, tables filled, policies settled. Needs no GPU.

    python -m tools.bench_host [--rows 2340] [--steps 48]

Each case is a method with its formats and a batch, at LLaVA-1.5-7B's layers, of prompts with random scores.
``before_ms``: until a step can be launched. ``settle_ms``: what its policies then decide; under full attention while
the device works, under A-VL when its scores have come. Medians over A-VL's refresh cycles of the mean step, processor
time of one thread. Rows that change their format are not converted here, only moved in the books.
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
from avl_edge.kv.pool import RowPool
from avl_edge.measure.profiler.timing import cycle_means
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
        self.before: list[float] = []
        self.settled: list[float] = []
        for cache in self._caches:
            for layer in range(SHAPE.layers):
                scores = self._random.random(len(cache.positions(layer)))
                cache.store_prompt(layer, scores, scores)
                cache.prune_prompt(layer, scores, scores)

    def step(self) -> None:
        """One step of all sequences, as the backends on a device do it."""
        layers, start = range(SHAPE.layers), time.thread_time()
        positions, slots = zip(*(cache.begin_step() for cache in self._caches), strict=True)
        reads = [Reads([cache.rows_to_read(layer) for layer in layers], cache.formats.text) for cache in self._caches]
        bucket = Bucket.of(reads, any(cache.wants_scores for cache in self._caches))
        listed = time.thread_time()
        if bucket not in self._tables:
            self._tables[bucket] = StepTables(Memory(), SHAPE.layers, bucket)  # type: ignore[arg-type]
        tables, filling = self._tables[bucket], time.thread_time()
        tables.fill([1] * len(reads), positions, np.stack(slots, axis=1), reads)
        self.before.append(listed - start + time.thread_time() - filling)
        weights = [
            [self._random.random(sum(len(each.ids) for each in of_layer)) for of_layer in own.rows] for own in reads
        ]
        start = time.thread_time()
        for cache, own in zip(self._caches, weights, strict=True):
            for layer in layers:
                cache.settle(layer, own[layer] if cache.wants_scores else None)
        self.settled.append(time.thread_time() - start)


def measure(choice: Choice, batch: int, rows: int, steps: int) -> dict[str, Any]:
    """The times of one case, in milliseconds."""
    running = Batch(choice, batch, rows, steps)
    for _ in range(steps):
        running.step()
    return {
        "method": choice.method.name,
        "formats": choice.formats.by_tier(),
        "batch": batch,
        "before_ms": _typical(running.before),
        "settle_ms": _typical(running.settled),
    }


def _typical(times: list[float]) -> float:
    return round(1000 * median(cycle_means(times, Avl().refresh)), 3)


def main(
    rows: Annotated[int, typer.Option(min=1, help="Image rows of each prompt.")] = 2340,
    steps: Annotated[int, typer.Option(min=3, help="Decode steps per case.")] = 48,
) -> None:
    """Time the host's part of decode steps and print one JSON document."""
    print(json.dumps([measure(choice, batch, rows, steps) for batch in (1, 16) for choice in CHOICES], indent=1))


if __name__ == "__main__":
    typer.run(main)
