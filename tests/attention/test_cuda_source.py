"""The CUDA kernels without a GPU: their source compiled as C++ for the CPU, and by NVIDIA's compilers for the device.

`plugins/emulation` runs the kernels with a context for each CUDA thread. They are compared with float64 arithmetic on
the same rounded inputs; outputs and workspace start as NaN, so that what a kernel fails to write shows.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avl_edge.attention.cuda import FORMATS, LOW_RANK, NoCuda, digest, nvrtc, source
from tests.equipment.emulated_kernels import (
    COMPILER,
    NAMES,
    PLUGINS,
    SHAPES,
    Kernels,
    Shape,
    compile_emulation,
    of_format,
)
from tests.equipment.emulated_parts import compiled

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
try:
    NVRTC: nvrtc.Nvrtc | None = nvrtc.find()
except NoCuda:
    NVRTC = None


@pytest.fixture(scope="module")
def kernels(shared_folder: Path) -> Callable[[Shape], Kernels]:
    """``kernels(shape)``: compiled once, for exact rows."""
    return compiled(dict.fromkeys(SHAPES, ("exact",)), shared_folder)


@dataclass
class Case:
    query: Tensor
    keys: Tensor
    values: Tensor
    rows: Tensor
    offsets: Tensor


def make_case(
    shape: Shape, counts: list[int], pool: int, kv_heads: int = 1, padding: int = 0, sharpness: float = 1, seed: int = 0
) -> Case:
    """Random selections, `counts` rows each, of a pool whose other rows hold NaN, as does the padding between rows."""
    generator = torch.Generator().manual_seed(seed)
    size = (pool, kv_heads, shape.dim + padding)
    keys, values = (torch.randn(size, generator=generator).to(shape.dtype) for _ in range(2))
    query = torch.randn(len(counts), kv_heads * shape.group, shape.dim, generator=generator) * sharpness
    rows = torch.randint(pool, (sum(counts),), generator=generator, dtype=torch.int32)
    for tensor in (keys, values):
        tensor[..., shape.dim :] = math.nan
        tensor[[row for row in range(pool) if row not in set(rows.tolist())]] = math.nan
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    return Case(query.to(shape.dtype), keys[..., : shape.dim], values[..., : shape.dim], rows, offsets)


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """out and scores in float64."""
    batch, heads, dim = case.query.shape
    group = heads // case.keys.shape[1]
    out, scores = (
        torch.zeros(batch, heads, dim, dtype=torch.float64),
        torch.zeros(case.rows.numel(), dtype=torch.float64),
    )
    for b, (begin, end) in enumerate(pairwise(case.offsets.tolist())):
        if begin < end:
            ids = case.rows[begin:end].long()
            key, value = (pool[ids].double().repeat_interleave(group, 1) for pool in (case.keys, case.values))
            logits = torch.einsum("hd,rhd->hr", case.query[b].double(), key) / math.sqrt(dim)
            softmax = logits.softmax(-1)
            out[b], scores[begin:end] = torch.einsum("hr,rhd->hd", softmax, value), softmax.mean(0)
    return out, scores


def check(case: Case, out: Tensor, scores: Tensor) -> None:
    """Within 2e-3 of float64 as a whole, and no element further off than its own rounding and float32's."""
    expected, expected_scores = reference(case)
    limits = torch.finfo(out.dtype)
    error = (out.double() - expected).abs()
    assert error.norm() <= 2e-3 * expected.norm()
    assert (error <= expected.abs() * limits.eps / 2 + limits.smallest_normal * limits.eps + 1e-5).all()
    assert ((scores.double() - expected_scores).abs() <= 1e-5).all()
    for begin, end in pairwise(case.offsets.tolist()):
        assert begin == end or abs(scores[begin:end].double().sum() - 1) < 1e-5


every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_shape
def test_counts_at_the_borders_of_tiles_and_splits(kernels: Callable[[Shape], Kernels], shape: Shape) -> None:
    tile, turn = shape.tile, shape.tile * shape.warps  # a turn: every warp of a block has a tile
    counts = [0, 1, tile - 1, tile, tile + 1, 2 * tile, 2 * tile + 1, 0, 2 * turn - 1, 2 * turn + 1, 8 * turn + 3]
    case = make_case(shape, counts, pool=50)
    out, scores = kernels(shape).attend(case.query, case.keys, case.values, case.rows, case.offsets, splits=2)
    assert scores is not None
    check(case, out, scores)
    assert not out[[0, 7]].any()
    assert torch.equal(out[1], case.values[case.rows[0].long()].repeat_interleave(shape.group, 0))
    assert scores[0] == 1


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_selection(kernels: Callable[[Shape], Kernels], data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES), "shape")
    case = make_case(
        shape,
        data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3), "counts"),
        pool=data.draw(st.integers(1, 60), "pool"),
        kv_heads=data.draw(st.integers(1, 2), "kv_heads"),
        padding=data.draw(st.sampled_from((0, 8)), "padding"),
        sharpness=data.draw(st.sampled_from((0.1, 1, 6)), "sharpness"),
        seed=data.draw(st.integers(0, 2**32), "seed"),
    )
    splits = data.draw(st.integers(1, 5), "splits")
    out, scores = kernels(shape).attend(case.query, case.keys, case.values, case.rows, case.offsets, splits)
    assert scores is not None
    check(case, out, scores)


def test_every_row_by_every_sequence(kernels: Callable[[Shape], Kernels]) -> None:
    shape, pool, batch = SHAPES[0], 40, 3
    case = make_case(shape, [1], pool)
    keys, values = (torch.randn(pool, 2, shape.dim).to(shape.dtype) for _ in range(2))
    rows = torch.arange(pool, dtype=torch.int32).repeat(batch)
    offsets = torch.arange(0, batch * pool + 1, pool, dtype=torch.int32)
    case = Case(torch.randn(1, 2, shape.dim).to(shape.dtype).repeat(batch, 1, 1), keys, values, rows, offsets)
    out, scores = kernels(shape).attend(case.query, keys, values, rows, offsets, splits=3)
    assert scores is not None
    check(case, out, scores)
    assert torch.equal(out[0], out[1])
    assert torch.equal(scores[:pool], scores[pool : 2 * pool])


def test_a_sequence_does_not_depend_on_others_on_scores_or_on_the_order_of_blocks(
    kernels: Callable[[Shape], Kernels],
) -> None:
    shape = SHAPES[2]
    case = make_case(shape, [30, 0, 45, 7], pool=60, kv_heads=2)
    run = kernels(shape).attend
    pool = (case.keys, case.values)
    out, scores = run(case.query, *pool, case.rows, case.offsets, splits=3)
    assert scores is not None
    backwards = run(case.query, *pool, case.rows, case.offsets, splits=3, backwards=True)
    assert torch.equal(out, backwards[0])
    assert torch.equal(scores, backwards[1])
    assert torch.equal(out, run(case.query, *pool, case.rows, case.offsets, splits=3, scores=False)[0])
    alone = run(case.query[2:3], *pool, case.rows[30:75], torch.tensor([0, 45], dtype=torch.int32), splits=3)
    assert torch.equal(out[2:3], alone[0])
    assert torch.equal(scores[30:75], alone[1])


def test_a_nan_in_a_selected_row_is_not_hidden(kernels: Callable[[Shape], Kernels]) -> None:
    shape = SHAPES[0]
    for spoiled in ("keys", "values"):
        case = make_case(shape, [20, 20], pool=50, kv_heads=2)
        getattr(case, spoiled)[case.rows[3], 1, 5] = math.nan
        case.rows[20:] = case.rows[0]  # the second sequence does not read the row
        out, _ = kernels(shape).attend(case.query, case.keys, case.values, case.rows, case.offsets, splits=2)
        assert out[0, 1].isnan().any()
        assert not out[0, 0].isnan().any()
        assert not out[1].isnan().any()


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_numbers_keep_their_value(kernels: Callable[[Shape], Kernels], dtype: torch.dtype) -> None:
    """One row has all the weight: out is its value, bit for bit, for the largest and the smallest numbers too."""
    shape = next(shape for shape in SHAPES if shape.dtype == dtype)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (8, 2, shape.dim), generator=generator, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = torch.where(values.isfinite(), values, torch.finfo(dtype).max)
    values[0, 0, 0], values[0, 0, 1] = torch.finfo(dtype).smallest_normal / 4, -torch.finfo(dtype).tiny
    query = torch.randn(8, 2 * shape.group, shape.dim).to(dtype)
    rows, offsets = torch.arange(8, dtype=torch.int32), torch.arange(9, dtype=torch.int32)
    out, _ = kernels(shape).attend(query, torch.randn(values.shape).to(dtype), values, rows, offsets, splits=1)
    assert torch.equal(out, values.repeat_interleave(shape.group, 1))


@every_shape
def test_append_writes_its_slots_and_nothing_else(kernels: Callable[[Shape], Kernels], shape: Shape) -> None:
    kv_heads, pool = 3, 9
    keys = torch.randn(pool, kv_heads, shape.dim + 8).to(shape.dtype)
    values = torch.randn(kv_heads, pool, shape.dim).to(shape.dtype).transpose(0, 1)
    new_keys, new_values = (torch.randn(4, kv_heads, shape.dim).to(shape.dtype) for _ in range(2))
    slots = torch.tensor([8, -1, 0, 3], dtype=torch.int32)
    expected = keys.clone(), values.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0][slot, :, : shape.dim], expected[1][slot] = new_keys[row], new_values[row]
    strides = (keys.stride(0), keys.stride(1), values.stride(0), values.stride(1))
    kernels(shape).launch("avl_append", (4, 2), new_keys, new_values, slots, kv_heads, *strides, keys, values)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


def prompt_reference(query: Tensor, keys: Tensor, positions: list[int]) -> list[Tensor]:
    """For each position the attention that all tokens receive from it, in float64, averaged over heads."""
    heads, n, dim = query.shape
    wide = keys.double().repeat_interleave(heads // keys.shape[0], 0)
    received = []
    for position in positions:
        logits = torch.einsum("hd,hnd->hn", query[:, position].double(), wide[:, : position + 1]) / math.sqrt(dim)
        received.append(torch.cat((logits.softmax(-1).mean(0), torch.zeros(n - position - 1, dtype=torch.float64))))
    return received


@every_shape
@pytest.mark.parametrize("token_major", [False, True], ids=["heads first", "tokens first"])
def test_prompt_scores(kernels: Callable[[Shape], Kernels], shape: Shape, token_major: bool) -> None:
    n, positions = 4 * shape.tile * shape.warps + 5, [3, 17, 17, 0]
    positions.append(n - 1)
    query, keys = (torch.randn(heads, n, shape.dim).to(shape.dtype) for heads in (shape.group, 1))
    if token_major:
        query, keys = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, keys))
    received = prompt_reference(query, keys, positions)
    total = torch.zeros(n)
    ids = torch.tensor(positions, dtype=torch.int32)
    last = kernels(shape).prompt_scores(query, keys, ids, len(positions) - 1, total)
    assert ((last - received[-1]).abs() <= 1e-5).all()
    assert ((total - sum(received[:-1])).abs() <= 1e-5).all()
    assert abs(last.double().sum() - 1) < 1e-5
    assert not total[18:].any(), "no query sees what comes after it"


@pytest.mark.parametrize("own", [1, 9])
def test_prompt_scores_of_the_last_tokens_alone(kernels: Callable[[Shape], Kernels], own: int) -> None:
    """Where the queries of those before them were never made: positions are those in the prompt all the same."""
    shape, n = SHAPES[1], 41
    query, keys = (torch.randn(n, heads, shape.dim).to(shape.dtype).transpose(0, 1) for heads in (2 * shape.group, 2))
    positions = torch.tensor([n - own, n - 1, n - (own + 1) // 2, n - 1], dtype=torch.int32)
    of_all, of_last = torch.zeros(2, n)
    run = kernels(shape).prompt_scores
    expected = run(query, keys, positions, 3, of_all)
    mine = query[:, n - own :].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(run(mine, keys, positions, 3, of_last), expected)
    assert torch.equal(of_last, of_all)
    received = prompt_reference(query, keys, positions.tolist())
    assert ((of_all - sum(received[:-1])).abs() <= 1e-5).all()
    assert ((expected - received[-1]).abs() <= 1e-5).all()


def test_prompt_scores_in_pieces(kernels: Callable[[Shape], Kernels]) -> None:
    shape, n = SHAPES[2], 37
    query, keys = (torch.randn(heads, n, shape.dim).to(shape.dtype) for heads in (2 * shape.group, 2))
    positions = torch.tensor([30, 31, 32, 36, 36], dtype=torch.int32)
    whole, pieces = torch.zeros(n), torch.zeros(n)
    run = kernels(shape).prompt_scores
    last = run(query, keys, positions, 4, whole)
    run(query, keys, positions[:2], 2, pieces)
    assert torch.equal(run(query, keys, positions[2:], 2, pieces), last)
    torch.testing.assert_close(pieces, whole)
    only = torch.zeros(n)
    assert torch.equal(run(query, keys, positions[-1:], 0, only), last)
    assert not only.any()


def _sanitized(folder: Path, sanitizer: str, format_: str, plugins: Path = PLUGINS) -> subprocess.CompletedProcess[str]:
    """The small case of plugins/emulation for rows of a format, sanitized, in a process of its own."""
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the emulation with")
    options = ["-O0", "-g1", f"-fsanitize={sanitizer}", *Shape(80, 2, torch.float16).macros]
    source, more = ("low_rank_check.cpp", []) if format_ == LOW_RANK else ("check.cpp", [of_format(format_)])
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
    macros = [f"-DHEAD_DIM={dim}", f"-DGROUP={group}", f"-DROW={row}", of_format(format_)]
    ptx, used = _device_build(architecture, macros, tmp_path)
    assert len(used) == 10
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
    assert len(record["cases"]) == 400
    assert {case["format"] for case in record["cases"]} == {*FORMATS, LOW_RANK}
    for case in record["cases"]:
        assert tuple(map(int, case["ptx_isa"].split("."))) <= (8, 5)
        for name, kernel in case["kernels"].items():
            assert kernel["spills"] == 0, (case, name)
            assert kernel["registers"] * 32 * 4 <= 65536 // 2, "at least two blocks to a multiprocessor"
