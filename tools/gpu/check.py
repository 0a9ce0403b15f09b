"""Whether the GPU computes what it should, and how fast: one command for a machine with CUDA.

    python -m tools.gpu.check [--only PATTERN] [--no-speed] [--out docs/measurements/gpu_sm_87.json]

Numerics of every kernel against float64, over every row format; the decode path against the CPU's, and CUDA graphs
against plain launches; tokens drawn on the device against the CPU's draws; the TensorRT plugin on real memory, and a
package of engines against the CPU; compute-sanitizer where it is installed; then bandwidth and latency. Writes one JSON
with the command, date, machine and versions. Ends with 1 when a check fails, with 2 where there is no CUDA.
"""

from __future__ import annotations

import fnmatch
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from avl_edge.attention.cuda import Gpu, KernelShape, NoCuda, digest, nvrtc
from avl_edge.backends.steps import CudaDevice
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.demo import DEMO
from avl_edge.model.families import read_spec
from avl_edge.resources import BrokenInstallation
from tools.gpu import decode, low_rank, model_speed, numerics, packed, report, speed
from tools.gpu.dut import DeviceUnderTest, GpuUnderTest
from tools.gpu.engines import check_engines
from tools.gpu.plugin import check_plugin
from tools.gpu.sampling import check_sampling
from tools.gpu.sanitize import TOOLS, check_sanitizer

MEASUREMENTS = Path("docs/measurements")


def correctness(dut: DeviceUnderTest) -> list[report.Check]:
    """What has to be right."""
    spec, weights = read_spec(DEMO), load_weights(DEMO)
    model, half = decode.Model(spec, weights), decode.Model(spec, decode.AsHalf(weights))
    return [
        *((f"numerics {_named(shape)}", partial(numerics.check_shape, dut, shape)) for shape in numerics.shapes()),
        *((f"formats {_named(shape)}", partial(packed.check_shape, dut, shape)) for shape in numerics.shapes()),
        *((f"low rank {_named(shape)}", partial(low_rank.check_shape, dut, shape)) for shape in numerics.shapes()),
        ("decode against the CPU, as stored", partial(decode.check_against_cpu, dut, model)),
        ("decode against the CPU, float16", partial(decode.check_against_cpu, dut, half)),
        ("decode against the CPU, packed rows", partial(decode.check_packed_against_cpu, dut, half)),
        ("decode against the CPU, sessions", partial(decode.check_sessions_against_cpu, dut, half)),
        ("decode against the CPU, low-rank rows", partial(decode.check_low_rank_against_cpu, dut, half)),
        ("decode by graphs against launches", partial(decode.check_graphs, dut, model)),
        ("sampling", partial(check_sampling, dut)),
        ("TensorRT plugin", partial(check_plugin, dut)),
        ("TensorRT engines", check_engines),
        *((f"sanitizer {tool}", partial(check_sanitizer, tool)) for tool in TOOLS),
    ]


def speeds(dut: DeviceUnderTest) -> list[report.Check]:
    """What has to be fast; a figure fails only where it could not be taken."""
    return [
        ("speed of attention", partial(speed.attention_cases, dut)),
        ("speed of a 7B model", partial(model_speed.cases, dut, model_speed.Sizes())),
    ]


def gpu_facts(gpu: Gpu) -> dict[str, Any]:
    """The GPU as its driver and torch name it, and what its kernels are made of."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "arch": gpu.arch,
        "multiprocessors": gpu.multiprocessors,
        "memory_bytes": properties.total_memory,
        "driver_cuda": "{}.{}".format(*gpu.cuda),
        "torch_cuda": torch.version.cuda,
        "nvrtc": str(nvrtc.find(gpu.cuda)),
        "source_sha256": digest(),
    }


def chosen(checks: list[report.Check], pattern: str) -> list[report.Check]:
    """Those whose name fits a shell pattern, or holds it."""
    return [(name, check) for name, check in checks if fnmatch.fnmatch(name, pattern) or pattern in name]


def _named(shape: KernelShape) -> str:
    return f"d{shape.head_dim} group{shape.group} {shape.row}"


def open_gpu() -> tuple[DeviceUnderTest, Mapping[str, Any]]:
    """The first GPU and its facts. Raises :class:`NoCuda`."""
    dut = GpuUnderTest(CudaDevice())
    return dut, gpu_facts(Gpu())


def main(
    only: Annotated[
        str, typer.Option(help="Run the checks whose names hold this, or fit it as a shell pattern.")
    ] = "*",
    with_speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Take the figures too.")] = True,
    out: Annotated[Path | None, typer.Option(help="The JSON to write. Default: by the GPU's architecture.")] = None,
) -> None:
    """Check the kernels, the decode path and their speed on this machine's GPU."""
    code = check(open_gpu, only, with_speed, out, "python -m tools.gpu.check " + shlex.join(sys.argv[1:]))
    raise typer.Exit(code)


def check(
    opened: Callable[[], tuple[DeviceUnderTest, Mapping[str, Any]]],
    only: str,
    with_speed: bool,
    out: Path | None,
    command: str,
) -> int:
    """Everything that :func:`main` does; its exit code."""
    try:
        dut, facts = opened()
    except (NoCuda, BrokenInstallation) as error:
        print(f"nothing was checked: {error}", file=sys.stderr)
        return 2
    checks = chosen(correctness(dut) + (speeds(dut) if with_speed else []), only)
    if not checks:
        print(f"no check is named like {only!r}: leave --only out to run them all", file=sys.stderr)
        return 2
    outcomes = report.run(checks)
    target = out or MEASUREMENTS / f"gpu_{facts['arch']}.json"
    report.write(target, command.strip(), report.machine(facts), outcomes)
    failed = sum(outcome.verdict == "failed" for outcome in outcomes)
    print(f"{len(outcomes)} checks, {failed} failed: {target}", file=sys.stderr)
    return report.exit_code(outcomes)


if __name__ == "__main__":
    typer.run(main)
