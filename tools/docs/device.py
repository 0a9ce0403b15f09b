"""The table of ``docs/device.md``: what the compiled CUDA kernels take of a GPU."""

from __future__ import annotations

from tools.docs.markdown import block, measured, table


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


TABLES = {"cuda-resources": cuda_resources}
