"""What the CUDA kernels need of a GPU: compiled by NVRTC, no GPU involved.

    python plugins/cuda/resources.py docs/measurements/cuda_resources.json

writes registers, shared memory and spills of every kernel of a decode step, for each shape, row format and
architecture. NVRTC comes with the wheel `nvidia-cuda-nvrtc-cu12` (12.6 is what JetPack 6 has, and emits PTX that its
driver accepts) or from an installed CUDA.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

from avl_edge.attention.cuda import FORMATS, LOW_RANK, KernelShape, NoCuda, digest, nvrtc, source

ARCHITECTURES = ("sm_87", "sm_90")
HEAD_SIZES, GROUPS, ROWS = (64, 80, 96, 128, 256), (1, 2, 4, 7, 8), ("Half", "Bfloat")
BY_FORMAT = ("avl_append", "avl_attend", "avl_scan", "avl_attend_low_rank")
"""The kernels that depend on the format of rows; the others are the same for all."""
_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def compile_for(compiler: nvrtc.Nvrtc, architecture: str, shape: KernelShape, format_: str) -> nvrtc.Compiled:
    """The kernels of one shape and format, or of all low-rank ones, with the assembler's account of them in the log."""
    options = ("--ptxas-options=-v", *shape.options)
    if format_ == LOW_RANK:
        return compiler.compile(source.read(source.LOW_RANK), source.LOW_RANK, architecture, options)
    return compiler.compile(source.read(), source.NAME, architecture, (*options, *FORMATS[format_]))


def resources(log: str) -> dict[str, dict[str, int]]:
    """By kernel: registers per thread; bytes of shared memory per block; bytes of stack and of spills per thread."""
    return {
        found["kernel"]: {
            "registers": int(found["registers"]),
            "shared": int(found["shared"] or 0),
            "stack": int(found["stack"]),
            "spills": int(found["stores"]) + int(found["loads"]),
        }
        for found in _KERNEL.finditer(log)
    }


def measure(compiler: nvrtc.Nvrtc, command: str) -> dict[str, Any]:
    cases = []
    readers = (*FORMATS, LOW_RANK)
    for architecture, dim, group, row, format_ in product(ARCHITECTURES, HEAD_SIZES, GROUPS, ROWS, readers):
        built = compile_for(compiler, architecture, KernelShape(dim, group, row), format_)
        case = {"architecture": architecture, "head_dim": dim, "group": group, "row": row, "format": format_}
        isa = "{}.{}".format(*nvrtc.isa(built.ptx))
        found = resources(built.log)
        kernels = {name: found[name] for name in sorted(found) if format_ == "exact" or name in BY_FORMAT}
        cases.append({**case, "ptx_isa": isa, "kernels": kernels})
    return {
        "command": command,
        "date": date.today().isoformat(),
        "nvrtc": str(compiler),
        "source_sha256": {name: digest(name) for name in (source.NAME, source.LOW_RANK)},
        "cases": cases,
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        compiler = nvrtc.find()
    except NoCuda as error:
        sys.exit(str(error))
    report = measure(compiler, f"python plugins/cuda/resources.py {sys.argv[1]}")
    cases = ",\n".join("  " + json.dumps(case) for case in report.pop("cases"))  # a line each
    head = json.dumps(report, indent=1)[:-2]
    Path(sys.argv[1]).write_text(f'{head},\n "cases": [\n{cases}\n ]\n}}\n')


if __name__ == "__main__":
    main()
