"""``avl-edge bench``"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer

from .. import bench, device
from .terminal import AsJson, Debug, progress, readers_may_leave

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Time the parts that decide the speed.")


@app.callback()
def _root() -> None:
    """Time the parts that decide the speed."""


@app.command()
def attention(
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences; may be repeated.")] = [1, 4, 16],  # noqa: B006
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[list[int], typer.Option(min=1, help="Key/value heads; may be repeated.")] = [32, 8],  # noqa: B006
    head_dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a sequence: image tokens of a LLaVA-1.6 picture.")] = 2340,
    core: Annotated[float, typer.Option(help="Percent of the rows that are read.")] = 30,
    dtype: Annotated[str, typer.Option(help=f"Of the rows: {', '.join(bench.DTYPES)}.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each way, of which the fastest counts.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Decode attention of one layer: selected rows where they lie, beside torch's ways. LLaVA-1.6-7B's shape."""
    if threads is not None:
        torch.set_num_threads(threads)
    shapes = [(count, kv) for kv in kv_heads for count in batch]
    todo = [bench.Case(count, heads, kv, head_dim, rows, core / 100, dtype) for count, kv in shapes]
    cases = []
    with progress("timing") as report:
        for case in todo:
            cases.append(bench.attention(case, rounds))
            if report:
                report(len(cases), len(todo))
    facts = device.probe()
    machine = {"cpu": facts.cpu.name, "cores": facts.cpu.cores, **bench.machine()}
    with readers_may_leave():
        print(json.dumps({"machine": machine, "cases": cases}) if as_json else _table(cases))


def _table(cases: list[dict[str, Any]]) -> str:
    """Milliseconds, and our time as a share of each of torch's."""
    lines = ["batch  kv heads     ours   slice, multiply        all rows      contiguous  (ms, and ours to it)"]
    for case in cases:
        ms = case["ms"]
        ours = ms["native"]
        others = (ms["slice_then_multiply"], ms["full"], ms["contiguous"])
        columns = "".join(f"  {time:9.3f} {ours / time:4.2f}" for time in others)
        lines.append(f"{case['batch']:5}  {case['kv_heads']:8}  {ours:7.3f}{columns}")
    return "\n".join(lines)
