"""What a decode step costs under full attention and under A-VL, on random weights at LLaVA-1.5-7B's layer shape.

    python -m tools.bench_decode [--layers 2] [--steps 30] [--out docs/measurements/decode.json]

Per case: ``ms_per_token`` of the whole step, ``attention_ms_per_token`` of its attention alone, rows and KV bytes
read per step, all layers together. The methods take turns step by step, so that a slow moment of the machine falls
on all of them; each figure is the mean over the fastest half of A-VL's refresh cycles.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from avl_edge.attention.kernels import attend_parts
from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.backends.decode_loop import DecodeLoop
from avl_edge.config import Formats
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.cache import SequenceCache, prompt_shape
from avl_edge.kv.methods import Avl, Full, Method
from avl_edge.measure.profiler.timing import per_step
from avl_edge.model.network.image_features import ImageFeatures
from avl_edge.model.spec import ModelSpec
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.request import ImageSpan, Prompt
from tools.random_model import RandomWeights, random_spec
from tools.record import machine

PREFIX, SUFFIX = 35, 36
VOCABULARY = 1024  # the head is not what is measured


@dataclass
class Case:
    """One method on one prompt, and the times of its steps in milliseconds."""

    method: Method
    cache: SequenceCache
    steps: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)


class Stopwatch:
    """Adds up the time spent in a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._function(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - start


def measure(spec: ModelSpec, model: VisionLanguageModel, image_rows: int, steps: int) -> list[dict[str, Any]]:
    """The cases of one prompt: full attention and the published A-VL, step by step in turn."""
    length = PREFIX + image_rows + SUFFIX
    prompt = Prompt((1,) * length, (ImageSpan("", PREFIX, image_rows),), None)
    shape = spec.text.kv_shape(model.dtype.itemsize)
    methods: tuple[Method, ...] = (Full(), Avl())
    counted = prompt_shape(length, prompt.spans)
    plans = [kv_plan(method, Formats(), shape, counted, steps) for method in methods]
    watch = Stopwatch(attend_parts)
    loop = DecodeLoop(TorchBackend.with_pages(model, sum(plan.pages for plan in plans), watch))
    generator = torch.Generator().manual_seed(1)
    drawn = torch.empty(image_rows, spec.text.hidden_size, dtype=model.dtype).normal_(generator=generator)
    features = ImageFeatures(drawn)
    cases = []
    for plan in plans:
        loop.prefill(prompt, features, plan)
        cases.append(Case(plan.method, loop.caches[-1]))
    for _ in range(steps):
        for case in cases:
            before, start = watch.seconds, time.perf_counter()
            loop.backend.decode([1], [case.cache])
            case.steps.append(1000 * (time.perf_counter() - start))
            case.attention.append(1000 * (watch.seconds - before))
    return [_row(case, image_rows, steps, shape.row_bytes) for case in cases]


def _row(case: Case, image_rows: int, steps: int, row_bytes: int) -> dict[str, Any]:
    rows, cycle = case.cache.rows_read / steps, Avl().refresh
    return {
        "image_rows": image_rows,
        "method": case.method.name,
        "ms_per_token": round(per_step(case.steps, cycle), 3),
        "attention_ms_per_token": round(per_step(case.attention, cycle), 3),
        "rows_read_per_step": round(rows, 1),
        "kv_bytes_read_per_step": round(rows * row_bytes),
    }


def main(
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 2,
    steps: Annotated[int, typer.Option(help="Decode steps per case.")] = 48,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
) -> None:
    """Time decode steps and print one JSON document."""
    spec = random_spec(layers, 4096, 11008, 32, VOCABULARY)  # LLaVA-1.5-7B's layers
    model = VisionLanguageModel(spec, RandomWeights(getattr(torch, dtype)))
    cases = [row for image_rows in (576, 2340) for row in measure(spec, model, image_rows, steps)]
    ratios = {
        f"{part}_avl_to_full_at_{full['image_rows']}": round(avl[part] / full[part], 3)
        for full, avl in zip(cases[::2], cases[1::2], strict=True)
        for part in ("ms_per_token", "attention_ms_per_token")
    }
    command = f"python -m tools.bench_decode --layers {layers} --steps {steps} --dtype {dtype}"
    document = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "model": f"random weights, LLaVA-1.5-7B's layer shape, {layers} layers, {dtype}",
        "cases": cases,
        "ratios": ratios,
    }
    text = json.dumps(document, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
