"""The TensorRT plugin: its numbers against ONNX Runtime on the graph's own reference body, its methods against the real
Python bindings of TensorRT.

The bindings come from the package index, three versions of one package side by side, each in a folder of pytest's
cache. Their libraries, which hold TensorRT itself, do not: libraries that export the same few names and do nothing take
their place, so that the package can be imported and its classes used. The kernels are `plugins/cuda`'s, on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.attention.cuda import FORMATS
from avl_edge.kv.layout import Format, groups, padded
from avl_edge.package.export.core_attention import DOMAIN, OPERATOR, OUTPUTS, reference_function
from tests import ROOT
from tests.equipment.emulated_kernels import COMPILER
from tests.equipment.trt_calls import SHAPES, Call, Shape, inputs_of, make_call, records_of, run_call

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

BINDINGS = {"10.3.0": "libnvinfer.so.10", "10.16.1.11": "libnvinfer.so.10", "11.4.0.106": "libnvinfer.so.11"}
"""What JetPack 6 and 7.2 have, and the newest; with the name of the library that it asks for."""
TOLERANCE = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Of results that are at most about 4, against float32: a unit in the last place, twice where a token joins."""
KINDS = ("step", "prompt", "mixed")

STUB = """
#define STUB(name) void *name(void) { return 0; }
STUB(createInferBuilder_INTERNAL) STUB(createInferRefitter_INTERNAL) STUB(createInferRuntime_INTERNAL)
STUB(createNvOnnxParserRefitter_INTERNAL) STUB(createNvOnnxParser_INTERNAL) STUB(getBuilderPluginRegistry)
STUB(getNvOnnxParserVersion) STUB(getPluginRegistry) STUB(initLibNvInferPlugins)
"""


@pytest.fixture(scope="module")
def kernels(shared_folder: Path) -> Path:
    """The folder with the kernels of all shapes, compiled for the CPU."""
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the emulation with")
    for shape in SHAPES:
        shape.compile(shared_folder)
    return shared_folder


def reference(shape: Shape, call: Call) -> dict[str, Any]:
    """ONNX Runtime on a graph of the one node with its reference body, in float32, over the same rounded numbers."""
    helper, kinds = onnx.helper, {torch.int32: onnx.TensorProto.INT32}
    feeds = {name: feed if feed.dtype in kinds else feed.float() for name, feed in inputs_of(call).items()}
    inputs = [
        helper.make_tensor_value_info(name, kinds.get(feed.dtype, onnx.TensorProto.FLOAT), [None] * feed.ndim)
        for name, feed in feeds.items()
    ]
    node = helper.make_node(OPERATOR, list(feeds), OUTPUTS, domain=DOMAIN, layer=int(call["layer"]))
    ranks = {"attended": 3, "row_scores": 2, "token_scores": 2}
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * ranks[name]) for name in OUTPUTS]
    kv_heads = call["key"].shape[1]
    model = helper.make_model(
        helper.make_graph([node], "node", inputs, outputs),
        functions=[reference_function(kv_heads * shape.group, kv_heads, shape.head_dim, shape.formats)],
        opset_imports=[helper.make_opsetid("", 19), helper.make_opsetid(DOMAIN, 1)],
        ir_version=9,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(None, {name: feed.numpy() for name, feed in feeds.items()}), strict=True))


def check(shape: Shape, call: Call, found: Call) -> None:
    expected, listed = reference(shape, call), int(call["row_offsets"][1, -1])
    np.testing.assert_allclose(found["attended"].float(), expected["attended"], atol=TOLERANCE[shape.dtype], rtol=0)
    if call["score_queries"].numel():
        rows = found["row_scores"][:, :listed]
        np.testing.assert_allclose(rows, expected["row_scores"][:, :listed], atol=1e-5, rtol=0)
        np.testing.assert_allclose(found["token_scores"], expected["token_scores"], atol=2e-5, rtol=0)
    slots = call["slots"][1].view(-1, len(call["query"]))
    pool, got = (torch.stack([each["pool_keys"], each["pool_values"]]) for each in (call, found))
    expected_bytes, bytes_ = (each.view(torch.uint8).flatten() for each in (pool, got))
    for format_, own in zip(FORMATS, slots, strict=False):
        for token in torch.nonzero(own >= 0)[:, 0].tolist():
            slot, key, value = int(own[token]), call["key"][token], call["value"][token]
            if format_ == "exact":
                pool[:, slot] = torch.stack([key, value])
                continue
            kinds = Format(format_).keys.name, Format(format_).values.name
            records = records_of(format_, slot, key, value, len(bytes_) // 2)
            for kind, (begin, record) in zip(kinds, records, strict=True):
                expected_bytes[begin : begin + len(record)] = record
                pads = padding(kind, *key.shape)  # which may be anything
                for each in (expected_bytes, bytes_):
                    each[begin : begin + len(record)][pads] = 0
    assert torch.equal(bytes_, expected_bytes), "other rows than those with a slot"


def padding(format_: str, heads: int, dim: int) -> torch.Tensor:
    """Which bytes of a record pad its sections."""
    sections = [2 * heads * (1 if format_ == "int8" else groups(dim)), heads * dim // 2]
    sections += sections[1:] if format_ == "int8" else []
    return torch.cat([torch.arange(padded(size)) >= size for size in sections])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(KINDS),
    counts=st.one_of(
        st.lists(st.just(1), min_size=1, max_size=4),  # a decode step
        st.lists(st.integers(1, 9), min_size=1, max_size=3),
        st.lists(st.integers(18, 30), min_size=1, max_size=1),  # more tokens than a block takes
    ),
    parts=st.integers(1, 4),
    backwards=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_numbers_are_those_of_the_reference_body(
    kernels: Path, shape: Shape, kind: str, counts: list[int], parts: int, backwards: bool, seed: int
) -> None:
    call = make_call(shape, kind, counts, seed, min(parts, len(shape.formats)))
    check(shape, call, run_call(shape.attention(kernels, backwards=backwards), call))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.dtype)
def test_step_whose_token_has_no_slot(kernels: Path, shape: Shape) -> None:
    """A prompt of one token looks like a step: the token is no row, yet it sees itself."""
    call = make_call(shape, "prompt", [1], 3)
    call["row_offsets"][:] = 0
    found = run_call(shape.attention(kernels), call)
    check(shape, call, found)
    torch.testing.assert_close(found["attended"], call["value"].repeat_interleave(shape.group, 1))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_sequence_does_not_depend_on_its_neighbours(kernels: Path, parts: int) -> None:
    """Sums of a step are cut by the pool's size, not by who else is in the batch: the bits are the same."""
    shape = SHAPES[0]
    both = next(call for seed in count() if not shares(call := make_call(shape, "step", [1, 1], seed, parts)))
    alone = dict(both)
    for name in ("query", "key", "value"):
        alone[name] = both[name][:1]
    begins, ends = both["row_offsets"][1, :-1:2].tolist(), both["row_offsets"][1, 1::2].tolist()
    own = [both["rows"][:, begin:end] for begin, end in zip(begins, ends, strict=True)]
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    alone["rows"], alone["slots"] = torch.cat(own, 1), both["slots"][:, ::2].contiguous()
    alone["row_offsets"] = torch.tensor([[0, *accumulate(lengths)]] * 3, dtype=torch.int32)
    alone["token_offsets"] = both["token_offsets"][:2]
    # The neighbour's new row is not written here: this sequence must not read it.
    alone["score_queries"] = torch.zeros(0, dtype=torch.int32)
    attention = shape.attention(kernels)
    assert torch.equal(run_call(attention, both)["attended"][:1], run_call(attention, alone)["attended"])


def shares(call: Call) -> bool:
    """Whether the first of two sequences reads the new row of the second, which is not written where it is alone."""
    lists = call["row_offsets"][1].tolist()
    own = [call["rows"][1, begin:end].tolist() for begin, end in zip(lists[:-1:2], lists[1::2], strict=True)]
    return any(slot in rows for slot, rows in zip(call["slots"][1, 1::2].tolist(), own, strict=True))


def test_kernels_have_no_race(tmp_path: Path) -> None:
    """Under the thread sanitizer: two warps, more columns than a tile, tokens without a slot, rows that are packed."""
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the emulation with")
    shape = Shape(16, 2, "float16", warps=2)
    program = """
import sys, torch
from pathlib import Path
from tests.equipment.trt_calls import Shape, make_call, run_call
shape = Shape(16, 2, "float16", warps=2)
for counts, parts in (([9, 3], 1), ([9, 3], 2), ([1, 1], 1)):
    run_call(shape.attention(Path(sys.argv[1])), make_call(shape, "mixed", counts, 5, parts))
print("done")
"""
    sanitizer = subprocess.run([str(COMPILER), "-print-file-name=libtsan.so"], capture_output=True, text=True)
    if not Path(sanitizer.stdout.strip()).is_absolute():
        pytest.skip("the compiler has no thread sanitizer as a shared library")
    shape.compile(tmp_path, "-fsanitize=thread", "-g1", formats=("exact", "int8"))
    environment = {**os.environ, "LD_PRELOAD": sanitizer.stdout.strip(), "OMP_NUM_THREADS": "1"}
    environment["TSAN_OPTIONS"] = f"exitcode=66:called_from_lib=1:suppressions={tmp_path / 'known'}"
    (tmp_path / "known").write_text("race:libtorch\nrace:libgomp\nrace:python\n")
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


# Through the real bindings


@pytest.fixture(scope="session", params=BINDINGS)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process needs to import one version of TensorRT's Python package."""
    version, compiler = request.param, shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-ins of TensorRT's libraries with")
    assert request.config.cache is not None
    folder = _installed(request.config.cache.mkdir("tensorrt_bindings"), version)
    libraries = tmp_path_factory.mktemp("libraries")
    (libraries / "stub.c").write_text(STUB)
    for part in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        name = BINDINGS[version].replace("libnvinfer", part)
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", name, "stub.c"]
        subprocess.run(command, cwd=libraries, check=True)
    path = f"{folder}{os.pathsep}{ROOT}"
    return {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _installed(cache: Path, version: str) -> Path:
    """The package in a folder of its own; skips where the index cannot be reached or has none for this machine."""
    folder = cache / f"{version}-{sys.implementation.cache_tag}"
    if not folder.is_dir():
        staging = cache / f"staging-{os.getpid()}-{version}"
        package = f"tensorrt-cu12-bindings=={version}"
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "20"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(staging), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(staging, ignore_errors=True)
            pytest.skip(f"{package} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        staging.rename(folder)
    return folder


def test_every_method_through_the_real_bindings(kernels: Path, bindings: dict[str, str], tmp_path: Path) -> None:
    """From the attribute of a node over a serialised engine to the numbers, for every kind of call and dtype."""
    counts = {"step": [1, 1, 1], "prompt": [7], "mixed": [3, 2]}
    cases = [(shape, make_call(shape, kind, counts[kind], seed)) for seed, shape in enumerate(SHAPES) for kind in KINDS]
    steps = [(shape, kind, parts) for shape in SHAPES[:2] for kind in ("step", "mixed") for parts in (2, 3)]
    cases += [(shape, make_call(shape, kind, counts["step"], 7, parts)) for shape, kind, parts in steps]
    cases += [(shape, make_call(shape, kind, counts[kind], 8, 3)) for shape in SHAPES[:2] for kind in KINDS[1:]]
    path = tmp_path / "cases.pt"
    torch.save(cases, path)
    command = [sys.executable, "-m", "tests.equipment.trt_on_cpu", str(path), str(kernels)]
    done = subprocess.run(command, cwd=tmp_path, env=bindings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for (shape, call), found in zip(cases, torch.load(path.with_suffix(".out"), weights_only=False), strict=True):
        check(shape, call, found)
    report = json.loads(done.stdout)
    assert report["creator"] == ["CoreAttention", "1", "avl"]
    assert report["attributes"] == [["layer", "PluginFieldType.INT32"]]
    assert report["plugin"] == ["CoreAttention", "1", "avl", 3]
    assert report["capabilities"] == [True, True, True]
    assert report["tactics"] == []
    assert report["wrong"] == [], "a dtype or format that the kernels do not know was taken"
    assert report["ranks"] == [3, 2, 2]
    assert report["symbols"] == [["query0", "query1", "query2"], [2, "rows1"], [2, "query0"]]
    assert report["loaded"] == [[shape.head_dim, shape.group, shape.dtype] for shape in SHAPES], "each once"
    assert report["packed"] == ["int4", "int8", "packed tokens"]
    assert report["outlives"]
    assert report["missing"] == [], "the bindings have no such names"
    assert report["registry"] == "TensorRT has no plugin registry: its libraries are not those of its Python package"
    assert report["refusals"] == [
        "BadInput: avl::CoreAttention needs the attribute layer, once: build the package again",
        "BadInput: avl::CoreAttention is for layer 3 of a decoder of 3: build the package again",
    ]
