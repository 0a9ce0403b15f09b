"""What the native decode step of a CPU costs: beside torch's on the demo model, and its products beside a plain sum.

    python -m tools.bench_step [--steps 48] [--megabytes 512] [--out step.json]

``steps``: each method with 1 and 2 threads, milliseconds of the fastest step, torch's and the native one, their ratio,
and ``host_ms``, what of the native one was spent outside of its call. ``products``: bytes of weights read per second by
one vector's product, as a share of what torch's sum of the same bytes as int64 reads; the best of several rounds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from avl_edge import Options, Runtime
from avl_edge.attention.decoder import Matrix, NativeDecoder, multiply
from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.backends.cpu.native import NativeBackend
from avl_edge.backends.decode_loop import DecodeLoop
from avl_edge.config import Formats
from avl_edge.kv.store import RowStore
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.demo import DEMO
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.serving.requests import Request
from tools.record import machine

PACKED = Formats("int4", "int4", "int4")
METHODS = (("full", None), ("avl", None), ("distinct", PACKED))
INPUTS = 4096
ROUNDS = 7


def _best(work: Callable[[], object]) -> float:
    """The shortest of several rounds, in seconds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def products(megabytes: int, threads: int) -> dict[str, float]:
    """Of each format of weights, the share of a sum's bandwidth."""
    outputs = megabytes * 2**20 // INPUTS
    codes = torch.randint(-100, 100, (outputs, INPUTS), dtype=torch.int8)
    matrices = {
        "bfloat16": Matrix(codes.view(torch.bfloat16)),
        "int8": Matrix(codes, scales=torch.ones(outputs, 1)),
        "int4": Matrix(codes.view(torch.uint8), scales=torch.ones(outputs, 2 * INPUTS // 128)),
    }
    sizes = {"bfloat16": INPUTS // 2, "int8": INPUTS, "int4": 2 * INPUTS}
    words = codes.view(torch.int64)
    torch.set_num_threads(threads)
    plain = _best(words.sum)
    shares = {"sum_gb_per_s": round(codes.nbytes / plain / 1e9, 1)}
    for name, matrix in matrices.items():
        vector = torch.randn(1, sizes[name])
        once = [_best(lambda m=matrix, v=vector, n=n: multiply(m, v, threads, n)) for n in (1, 3)]  # type: ignore[misc]
        shares[name] = round(plain / ((once[1] - once[0]) / 2), 3)
    return shares


class Watched(NativeDecoder):
    """Adds up the time that is spent in steps."""

    seconds = 0.0

    def step(self, *arguments: Any) -> torch.Tensor:
        start = time.perf_counter()
        try:
            return super().step(*arguments)
        finally:
            Watched.seconds += time.perf_counter() - start


def _fastest(backend: TorchBackend, request: Request, steps: int) -> tuple[float, float]:
    """The fastest step, and the least of what one spent outside of a native call, in milliseconds."""
    with DecodeLoop(backend) as loop:
        loop.prefill(request.prompt, loop.encode(request.prompt), request.plan)
        whole, outside = [], []
        for _ in range(steps):
            before, start = Watched.seconds, time.perf_counter()
            loop.decode_greedy([5])
            whole.append(time.perf_counter() - start)
            outside.append(whole[-1] - (Watched.seconds - before))
    return 1000 * min(whole), 1000 * min(outside)


def steps_of(model: VisionLanguageModel, request: Request, steps: int, threads: int) -> dict[str, Any]:
    """Torch's steps and native ones of one request."""
    torch.set_num_threads(threads)
    shape = model.spec.text.kv_shape(model.dtype.itemsize)
    theirs, _ = _fastest(TorchBackend(model, RowStore(request.plan.pages, shape, model.dtype)), request, steps)
    ours, host = _fastest(
        NativeBackend(model, RowStore(request.plan.pages, shape, model.dtype), threads, decoder=Watched), request, steps
    )
    return {
        "method": request.plan.method.name,
        "formats": request.plan.formats.by_tier(),
        "threads": threads,
        "torch_ms": round(theirs, 3),
        "native_ms": round(ours, 3),
        "host_ms": round(host, 3),
        "native_to_torch": round(ours / theirs, 3),
    }


def main(
    steps: Annotated[int, typer.Option(min=3, help="Decode steps of each case.")] = 48,
    megabytes: Annotated[int, typer.Option(min=1, help="Weights of a product.")] = 512,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
) -> None:
    """Time native steps and products, and print one JSON document."""
    runtime = Runtime.open("demo")
    model = VisionLanguageModel(runtime.spec, load_weights(DEMO))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8))
    requests = [
        runtime.prepare([picture], "What is this?", Options(name, formats=formats, max_new_tokens=steps + 1))
        for name, formats in METHODS
    ]
    document = {
        "command": f"python -m tools.bench_step --steps {steps} --megabytes {megabytes}",
        "date": date.today().isoformat(),
        "machine": machine(),
        "steps": [steps_of(model, request, steps, threads) for threads in (1, 2) for request in requests],
        "products": [{"threads": threads, **products(megabytes, threads)} for threads in (1, 2)],
    }
    text = json.dumps(document, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
