"""The CUDA kernels as C++ under sanitizers, and that these notice what is broken."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from avl_edge.attention.cuda import FORMATS, LOW_RANK
from tests.equipment.emulated_kernels import COMPILER, PLUGINS, Shape, compile_emulation


def _sanitized(folder: Path, sanitizer: str, format_: str, plugins: Path = PLUGINS) -> subprocess.CompletedProcess[str]:
    """The small case of plugins/emulation for rows of a format, sanitized, in a process of its own."""
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the emulation with")
    options = ["-O0", "-g1", f"-fsanitize={sanitizer}", *Shape(80, 2, torch.float16).macros]
    source, more = ("low_rank_check.cpp", ()) if format_ == LOW_RANK else ("check.cpp", FORMATS[format_])
    program = compile_emulation(source, folder / sanitizer, *options, *more, plugins=plugins)
    # Without a fixed layout of memory the thread sanitizer of older compilers does not start on newer kernels.
    fixed = [setarch, "-R"] if sanitizer == "thread" and (setarch := shutil.which("setarch")) else []
    if fixed and subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    environment = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([*fixed, str(program)], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizer", "format_"),
    [
        ("thread", "exact"),
        ("address", "exact"),
        ("thread", "int8"),
        ("thread", LOW_RANK),
        ("address", LOW_RANK),
        pytest.param("address", "int4", marks=pytest.mark.long),
        pytest.param("address", "int8", marks=pytest.mark.long),
        pytest.param("thread", "int4", marks=pytest.mark.long),
    ],
)
def test_sanitizers_find_nothing(tmp_path: Path, sanitizer: str, format_: str) -> None:
    run = _sanitized(tmp_path, sanitizer, format_)
    assert run.returncode == 0, run.stdout + run.stderr


NO_TURN = ("    __syncthreads();\n    int higher_before", "    int higher_before")


SCALES_WRITTEN = "        __syncthreads();  // of which each warp has written some\n"


RUNS_OVER = "records + (long long)(row + 1) * kUnit"


MIXED_READ = "        __syncthreads();  // what was mixed has been read\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sound", "broken", "report"),
    [
        (
            "thread exact",
            "    __syncthreads();\n\n    const long long result",
            "    const long long result",
            "data race",
        ),
        (
            "address exact",
            "entry(tile, u) < count ? rows[entry(tile, u)] : 0",
            "rows[entry(tile, u)]",
            "heap-buffer-overflow",
        ),
        ("address exact", "wait_copies<STAGES - 1>", "wait_copies<STAGES>", "out nan"),
        (f"thread {LOW_RANK}", MIXED_READ, "", "data race"),
        (f"address {LOW_RANK}", "min(first + row, split.count - 1)", "first + row", "overflow"),
        (f"address {LOW_RANK}", "    if (own >= coefficients.rank) return;\n", "", "overflow"),
        pytest.param("thread int8", SCALES_WRITTEN, "", "data race", marks=pytest.mark.long),
        pytest.param("thread int4", *NO_TURN, "data race", marks=pytest.mark.long),
        pytest.param("address int4", "records + (long long)row * kUnit", RUNS_OVER, "overflow", marks=pytest.mark.long),
    ],
    ids=[
        "a barrier missing",
        "rows past the end",
        "a copy not waited for",
        "a sum not waited for",
        "positions past the end",
        "coefficients past the end",
        "scales not waited for",
        "picks not waited for",
        "records past the end",
    ],
)
def test_the_emulation_notices(tmp_path: Path, case: str, sound: str, broken: str, report: str) -> None:
    shutil.copytree(PLUGINS, tmp_path / "plugins")
    files = [path for path in (tmp_path / "plugins" / "cuda").glob("*.cu*") if sound in path.read_text()]
    assert files
    for path in files:
        path.write_text(path.read_text().replace(sound, broken))
    run = _sanitized(tmp_path, *case.split(), tmp_path / "plugins")
    assert run.returncode != 0
    assert report in run.stdout + run.stderr
