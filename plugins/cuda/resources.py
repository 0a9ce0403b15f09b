"""What the CUDA kernels need of a GPU: compiled by NVRTC, no GPU involved.

    python plugins/cuda/resources.py docs/measurements/cuda_resources.json

writes registers, shared memory and spills of every kernel, for each shape and architecture. NVRTC comes with the wheel
`nvidia-cuda-nvrtc-cu12` (12.6 is what JetPack 6 has, and emits PTX that its driver accepts) or from an installed CUDA.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from datetime import date
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("core_attention.cu")
ARCHITECTURES = ("sm_87", "sm_90")
HEAD_SIZES, GROUPS, ROWS = (64, 80, 96, 128, 256), (1, 2, 4, 7, 8), ("Half", "Bfloat")
_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def digest() -> str:
    """Of the source that the figures belong to, without its comments and spacing."""
    code = re.sub(r"//.*", "", SOURCE.read_text())
    return hashlib.sha256(" ".join(code.split()).encode()).hexdigest()


def library() -> ctypes.CDLL | None:
    """NVRTC, from the wheel or the system, or None."""
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found = [str(path) for folder in folders for path in sorted(folder.glob("cu*/lib/libnvrtc.so.*"))]
    found += [name] if (name := ctypes.util.find_library("nvrtc")) else []
    for name in found:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def version(nvrtc: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_source(nvrtc: ctypes.CDLL, architecture: str, macros: Iterable[str]) -> tuple[str, str]:
    """The PTX of the kernels, and the log of their assembly. Raises ValueError with the log when it fails."""
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v", *macros]
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None)
    arguments = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    log = _text(nvrtc, program, "ProgramLog")
    ptx = "" if status else _text(nvrtc, program, "PTX")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise ValueError(f"{SOURCE.name} does not compile for {architecture}: {log}")
    return ptx, log


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.value.decode()


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


def isa(ptx: str) -> tuple[int, int]:
    """The version of the PTX language that a text asks for."""
    found = re.search(r"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE)
    assert found, "PTX names its version"
    return int(found[1]), int(found[2])


def measure(nvrtc: ctypes.CDLL, command: str) -> dict[str, Any]:
    cases = []
    for architecture, dim, group, row in product(ARCHITECTURES, HEAD_SIZES, GROUPS, ROWS):
        macros = (f"-DHEAD_DIM={dim}", f"-DGROUP={group}", f"-DROW={row}")
        ptx, log = compile_source(nvrtc, architecture, macros)
        case = {"architecture": architecture, "head_dim": dim, "group": group, "row": row}
        cases.append({**case, "ptx_isa": "{}.{}".format(*isa(ptx)), "kernels": resources(log)})
    return {
        "command": command,
        "date": date.today().isoformat(),
        "nvrtc": "{}.{}".format(*version(nvrtc)),
        "source_sha256": digest(),
        "cases": cases,
    }


def main() -> None:
    nvrtc = library()
    if nvrtc is None or len(sys.argv) != 2:
        sys.exit(f"{__doc__}\nNVRTC {'is not installed' if nvrtc is None else 'was found'}.")
    report = measure(nvrtc, f"python plugins/cuda/resources.py {sys.argv[1]}")
    cases = ",\n".join("  " + json.dumps(case) for case in report.pop("cases"))  # a line each
    head = json.dumps(report, indent=1)[:-2]
    Path(sys.argv[1]).write_text(f'{head},\n "cases": [\n{cases}\n ]\n}}\n')


if __name__ == "__main__":
    main()
