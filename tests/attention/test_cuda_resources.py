"""The CUDA kernels compiled for the device by NVIDIA's compilers: registers, spills and instructions."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from avl_edge.attention.cuda import FORMATS, LOW_RANK, NoCuda, digest, nvrtc, source
from tests.equipment.emulated_kernels import PLUGINS

try:
    NVRTC: nvrtc.Nvrtc | None = nvrtc.find()
except NoCuda:
    NVRTC = None
RECORD = PLUGINS.parent / "docs" / "measurements" / "cuda_resources.json"
NVCC = shutil.which("nvcc")


def _load_resources() -> Any:
    spec = importlib.util.spec_from_file_location("cuda_resources", PLUGINS / "cuda" / "resources.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


resources = _load_resources()


def _device_build(
    architecture: str, macros: list[str], folder: Path, name: str = source.NAME
) -> tuple[str, dict[str, dict[str, int]]]:
    if NVRTC:
        built = NVRTC.compile(source.read(name), name, architecture, ["--ptxas-options=-v", *macros])
        return built.ptx, resources.resources(built.log)
    if NVCC is None:
        pytest.skip("neither NVRTC nor nvcc to compile for a GPU with: pip install 'nvidia-cuda-nvrtc-cu12==12.6.*'")
    command = [NVCC, f"-arch={architecture}", "-std=c++17", "-Xptxas=-v", *macros, str(source.path(name))]
    built = [
        subprocess.run([*command, kind, "-o", str(folder / kind)], capture_output=True, text=True, check=True)
        for kind in ("-ptx", "-cubin")
    ]
    return (folder / "-ptx").read_text(), resources.resources(built[1].stderr)


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize(
    ("dim", "group", "row", "format_"),
    [(128, 1, "Half", "exact"), (80, 7, "Bfloat", "int4"), (256, 8, "Half", "exact"), (128, 8, "Half", "int8")],
)
def test_compiles_for_the_device_without_spills(
    tmp_path: Path, architecture: str, dim: int, group: int, row: str, format_: str
) -> None:
    macros = [f"-DHEAD_DIM={dim}", f"-DGROUP={group}", f"-DROW={row}", *FORMATS[format_]]
    ptx, used = _device_build(architecture, macros, tmp_path)
    assert len(used) == 11
    assert all(kernel["spills"] == 0 for kernel in used.values()), used
    attend = ptx[ptx.index(".entry avl_attend") :].split(".entry", 2)[1]
    assert attend.count("cp.async.cg.shared.global" if format_ == "exact" else "cp.async.ca.shared.global") >= 8
    if NVRTC and NVRTC.version <= (12, 6):
        assert nvrtc.isa(ptx) <= (8, 5), "JetPack 6 does not take newer PTX"


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize(("dim", "group", "row"), [(128, 1, "Half"), (80, 7, "Bfloat"), (256, 8, "Half")])
def test_low_rank_rows_compile_for_the_device_without_spills(
    tmp_path: Path, architecture: str, dim: int, group: int, row: str
) -> None:
    macros = [f"-DHEAD_DIM={dim}", f"-DGROUP={group}", f"-DROW={row}"]
    ptx, used = _device_build(architecture, macros, tmp_path, source.LOW_RANK)
    assert used.keys() == {"avl_attend_low_rank"}
    assert all(kernel["spills"] == 0 for kernel in used.values()), used
    assert ptx.count("ld.shared.v4.f32") >= 8, "coefficients are read four at a time"


def test_the_recorded_resources_are_of_this_source() -> None:
    record = json.loads(RECORD.read_text())
    sources = {name: digest(name) for name in (source.NAME, source.LOW_RANK)}
    assert record["source_sha256"] == sources, f"record them again: {record['command']}"
    assert len(record["cases"]) == 500
    assert {case["format"] for case in record["cases"]} == {*FORMATS, LOW_RANK}
    for case in record["cases"]:
        assert tuple(map(int, case["ptx_isa"].split("."))) <= (8, 5)
        for name, kernel in case["kernels"].items():
            assert kernel["spills"] == 0, (case, name)
            assert kernel["registers"] * 32 * 4 <= 65536 // 2, "at least two blocks to a multiprocessor"
