"""``avl-edge bench``"""

from __future__ import annotations

import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..config import format_size, require
from ..machine import device
from ..measure import bench
from ..measure.evaluate import draw_attention, require_plot
from .help import Group
from .progress import progress
from .terminal import AsJson, Debug, readers_may_leave

app = typer.Typer(cls=Group, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Time the parts that decide the speed."""


@app.command(short_help="Decode attention of one layer, beside torch's ways.")
def attention(
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences; may be repeated.")] = [1, 4, 16],  # noqa: B006
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[list[int], typer.Option(min=1, help="Key/value heads; may be repeated.")] = [32, 8],  # noqa: B006
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a sequence: image tokens of a LLaVA-1.6 picture.")] = 2340,
    core: Annotated[float, typer.Option(help="Percent of the rows that are read.")] = 30,
    dtype: Annotated[str, typer.Option(help=f"Of the rows: {', '.join(bench.DTYPES)}.")] = "bfloat16",
    formats: Annotated[
        str, typer.Option(help=f"What our kernel reads rows in, with commas: {', '.join(bench.FORMATS)}.")
    ] = "exact",
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each way, of which the fastest counts.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, max=os.cpu_count(), help="CPU threads.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latency over batch size into this file, SVG or PNG.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Decode attention of one layer: selected rows where they lie, beside torch's ways. LLaVA-1.6-7B's shape."""
    if plot:
        require_plot(plot)
    require(0 < core <= 100, f"--core must be above 0 and at most 100 percent, not {core:g}")
    fraction = float(Decimal(str(core)) / 100)  # exact: 33.3 / 100 in binary is less than 0.333
    shapes = [(count, kv) for kv in kv_heads for count in batch]
    names = formats.split(",")
    todo = [
        bench.Case(count, heads, kv, head_dim, rows, fraction, dtype, name) for count, kv in shapes for name in names
    ]
    require(not plot or names == ["exact"], "--plot draws exact rows only: leave --formats out")
    facts = device.probe()
    _require_memory(max(case.bytes for case in todo), facts.memory.usable_bytes)
    if threads is not None:
        torch.set_num_threads(threads)
    cases = []
    with progress("timing") as report:
        for case in todo:
            cases.append(bench.attention(case, rounds))
            if report:
                report(len(cases), len(todo))
    machine = {"cpu": facts.cpu.name, "cores": facts.cpu.cores, **bench.machine()}
    document = {"machine": machine, "cases": cases}
    with readers_may_leave():
        print(json.dumps(document) if as_json else _table(cases))
    if plot:
        draw_attention(document, plot)


def _require_memory(needed: int, usable: int | None) -> None:
    require(
        usable is None or needed <= usable,
        f"the rows take {format_size(needed)}, and {format_size(usable or 0)} are free: give fewer or smaller ones",
    )


def _table(cases: list[dict[str, Any]]) -> str:
    """Milliseconds, and our time as a share of each of torch's."""
    lines = ["batch  kv heads     ours   slice, multiply        all rows      contiguous  (ms, and ours to it)"]
    for case in cases:
        ms = case["ms"]
        ours = ms["native"]
        others = (ms["slice_then_multiply"], ms["full"], ms["contiguous"])
        columns = "".join(f"  {time:9.3f} {ours / time:4.2f}" for time in others)
        packed = "" if case["format"] == "exact" else f"  {case['format']}"
        lines.append(f"{case['batch']:5}  {case['kv_heads']:8}  {ours:7.3f}{columns}{packed}")
    return "\n".join(lines)
