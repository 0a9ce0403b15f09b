"""The tables of ``docs/device.md``: what the compiled CUDA kernels take of a GPU, and what is planned for models whose
speed others have published."""

from __future__ import annotations

from avl_edge.machine.profile import named
from avl_edge.model.known import known_shape
from avl_edge.model.sizes import Precision
from avl_edge.planning.estimate import PlanRequest, plan
from tools.docs.markdown import block, measured, table

_INT4 = Precision("int4", "fp16")
PUBLISHED: dict[str, tuple[float | None, float | None, float, float | None]] = {
    "qwen3-vl-2b": (36, 46, 98.9, 4.6),
    "qwen3-vl-4b": (36, 106, 54.7, 6.1),
    "qwen3-vl-8b": (53, 178, 32.1, 9.0),
    "llava-1.6-vicuna-7b": (None, None, 35.6, None),
}
"""Vision encoder and prompt in ms, tokens per second, memory in GB, on a Jetson AGX Orin 64 GB, batch 1, INT4 with a
head of 16 bits: TensorRT Edge-LLM 0.10 for the Qwens with a picture of 265 tokens, TinyChat's VILA-7B, which is of
LLaVA's sizes, for LLaVA-1.6."""


def planned_beside_published() -> str:
    """What the derived profile predicts, and how far that is from what others have measured."""
    lines = []
    for name, published in PUBLISHED.items():
        request = PlanRequest(image_size=(640, 424), prompt_tokens=20, system_tokens=10, weights=_INT4)
        found = plan(known_shape(name), named("agx-orin-64", "MAXN"), request)
        time = found.time
        planned = (time.encode_ms, time.prefill_ms, time.tokens_per_s, found.memory.peak_bytes / 1e9)
        cells = [_beside(own, other) for own, other in zip(planned, published, strict=True)]
        lines.append([name, found.prompt.images, *cells])
    header = ["model, INT4", "image tokens", "vision, ms", "prompt, ms", "tokens/s", "memory, GB"]
    return table(header, lines)


def _beside(planned: float, published: float | None) -> str:
    own = f"{planned:.0f}" if planned >= 100 else f"{planned:.3g}"
    return own if published is None else f"{own} ({published:g}, {100 * (planned / published - 1):+.0f} %)"


def cuda_resources() -> str:
    """By architecture and row format: the most over all head sizes, head groups and dtypes."""
    document = measured("cuda_resources")
    lines = []
    for architecture, row_format in sorted({(case["architecture"], case["format"]) for case in document["cases"]}):
        cases = [x for x in document["cases"] if (x["architecture"], x["format"]) == (architecture, row_format)]
        kernels = [kernel for case in cases for kernel in case["kernels"].values()]
        most = (max(kernel[key] for kernel in kernels) for key in ("registers", "shared", "stack", "spills"))
        lines.append([f"{architecture}, {row_format.replace('lowrank', 'low-rank')} rows", len(kernels), *most])
    header = ["", "kernels compiled", "most registers", "most static shared memory, bytes", "stack", "spills"]
    return block(table(header, lines), "cuda_resources")


TABLES = {"cuda-resources": cuda_resources, "planned-beside-published": planned_beside_published}
