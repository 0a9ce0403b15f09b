"""Whole decode steps of a model in LLaVA-1.6-7B's shape, its weights drawn at random, under full attention,
A-VL, packed rows and low-rank ones."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from avl_edge.backends.decode_loop import DecodeLoop
from avl_edge.config import Formats
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.cache import prompt_shape
from avl_edge.kv.methods import AttentionPack, Avl, Coarse, Full, Method
from avl_edge.measure.profiler.timing import cycle_means
from avl_edge.model.network.image_features import ImageFeatures
from avl_edge.model.spec import ModelSpec
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.request import ImageSpan, Prompt
from tools.gpu.dut import DeviceUnderTest, backend, row_store
from tools.random_model import RandomWeights, random_spec

PREFIX, IMAGE, SUFFIX = 35, 2340, 36
INT8 = Formats("int8", "int8", "int8")
REQUESTS: tuple[tuple[Method, Formats], ...] = (
    (Full(), Formats()),
    (Avl(), Formats()),
    (Full(), INT8),
    (Full(), Formats("int4", "int4", "int4")),
    (Coarse(), INT8),
    (AttentionPack(), AttentionPack.formats),
)


@dataclass(frozen=True)
class Sizes:
    """What is run: decoder layers, tokens of a vocabulary, image rows, and steps of each case."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32064
    image: int = IMAGE
    steps: int = 48

    @property
    def spec(self) -> ModelSpec:
        return random_spec(self.layers, self.hidden, self.inner, self.heads, self.vocabulary)

    @property
    def prompt(self) -> Prompt:
        return Prompt((1,) * (PREFIX + self.image + SUFFIX), (ImageSpan("", PREFIX, self.image),), None)


class Model:
    """The random model on its device; ``bytes`` of the weights that a decode step reads."""

    def __init__(self, dut: DeviceUnderTest, sizes: Sizes, dtype: torch.dtype = torch.float16) -> None:
        device = dut.accelerator.device
        weights = RandomWeights(dtype, device)
        with device:
            self.model = VisionLanguageModel(sizes.spec, weights)
        embedding = self.model.decoder.embedding.nbytes
        self.bytes = weights.bytes - embedding  # of the embedding a step reads one row
        self.features = ImageFeatures(torch.randn(sizes.image, sizes.hidden, dtype=dtype, device=device))


def measure(
    dut: DeviceUnderTest, model: Model, sizes: Sizes, method: Method, formats: Formats, batch: int
) -> dict[str, Any]:
    """Prompts one after the other, then ``steps`` tokens for all of them together."""
    prompt = sizes.prompt
    shape = sizes.spec.text.kv_shape(model.model.dtype.itemsize)
    planned = kv_plan(method, formats, shape, prompt_shape(len(prompt), prompt.spans), sizes.steps)
    loop = DecodeLoop(backend(dut, model.model, row_store(dut, model.model, batch * planned.pages)))
    caches = [loop.add(prompt, planned) for _ in range(batch)]
    start = time.perf_counter()
    for cache in caches:
        loop.run(prompt, model.features, cache)
    prefilled = time.perf_counter()
    times = _decode(loop, sizes.steps)
    step = _typical(times)
    kv_bytes = sum(cache.bytes_read for cache in caches) / sizes.steps
    return {
        "method": method.name,
        "format": _named(formats),
        "batch": batch,
        "prefill_ms": round(1000 * (prefilled - start) / batch, 2),
        "step_ms": round(1000 * step, 3),
        "tokens_per_s": round(batch / step, 1),
        "kv_bytes_per_step": round(kv_bytes),
        "weights_bytes": model.bytes,
        "gb_per_s": round((model.bytes + kv_bytes) / 1e9 / step, 1),
        "kv_peak_bytes": sum(cache.rows.lease.peak for cache in caches) * loop.pool.page_bytes,
        "end_to_end_s": round(prefilled - start + sum(times), 3),
    }


def _named(formats: Formats) -> str:
    """The formats of all rows: one name where they have one."""
    return "/".join(dict.fromkeys(formats.by_tier().values()))


def _decode(loop: DecodeLoop, steps: int) -> list[float]:
    """Seconds of each step, on the host's clock: what a caller waits."""
    tokens, times = [1] * len(loop.caches), []
    for _ in range(steps):
        start = time.perf_counter()
        tokens = loop.decode_greedy(tokens)
        times.append(time.perf_counter() - start)
    return times


def _typical(times: list[float]) -> float:
    """The median over A-VL's refresh cycles, each whole, of the mean step; the first cycles record graphs."""
    cycle = Avl().refresh
    return median(cycle_means(times[2 * cycle :], cycle))


def cases(dut: DeviceUnderTest, sizes: Sizes, batches: tuple[int, ...] = (1, 16)) -> dict[str, Any]:
    """Every method at every batch that fits the device's memory, and how much A-VL gains over full attention."""
    model = Model(dut, sizes)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        for method, formats in REQUESTS:
            try:
                rows.append(measure(dut, model, sizes, method, formats, batch))
            except torch.OutOfMemoryError:
                named = {"method": method.name, "format": _named(formats), "batch": batch}
                rows.append({**named, "skipped": "it does not fit the device's memory"})
    steps: dict[tuple[str, int], float] = {
        (row["method"], row["batch"]): row["step_ms"] for row in rows if "step_ms" in row and row["format"] == "exact"
    }
    ratios = {
        f"full_to_avl_step_at_{batch}": round(steps["full", batch] / steps["avl", batch], 3)
        for batch in batches
        if steps.keys() >= {("full", batch), ("avl", batch)}
    }
    return {"model": f"random float16 weights, {sizes}", "cases": rows, **ratios}
