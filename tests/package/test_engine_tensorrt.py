"""Graphs through a real TensorRT parser and builder: TensorRT-RTX, which needs no GPU to build and has the same calls.

Each build is a process of its own, since TensorRT may abort the one that it is in.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from avl_edge.package.engine import TIMINGS, VISION_ENGINE, BuildFailed, build_engine, find_tensorrt, open_package
from avl_edge.package.engine.recipe import MOST_PRUNED
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import SPECS, make_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None or importlib.util.find_spec("onnx") is None,
    reason="needs the packages tensorrt-rtx and onnx",
)

# What the device has as `tensorrt`.
AS_TENSORRT = """
    import sys
    import tensorrt_rtx
    sys.modules["tensorrt"] = tensorrt_rtx
"""
COMMAND = """
    from avl_edge.cli import main
    main()
"""
DECODER = """
    import json
    from pathlib import Path
    from avl_edge.package.engine import BuildFailed, Recipe, build_engine, decoder_profiles, find_tensorrt
    from avl_edge.package.export import DECODER, PLUGIN_DECODER, Settings, decoder_bindings, export_model
    from avl_edge.model.families import read_spec

    model, out, precision, prune_after = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    spec, trt = read_spec(model), find_tensorrt()
    export_model(spec, model, out, Settings(precision, prune_after))
    recipe = Recipe(precision, "never" if prune_after is None else prune_after, 1, 100, 4, 512)
    inputs, profiles = decoder_bindings(spec, precision, prune_after).inputs, decoder_profiles(spec, recipe, precision)
    seen = []

    def build(name):
        return build_engine(trt, out / name, inputs, profiles, 2**28, b"", lambda *at: seen.append(at))

    engine, timings = build(DECODER)
    assert len(seen) > 10 and all(done <= total for done, total in seen)
    try:
        build(PLUGIN_DECODER)
    except BuildFailed as error:
        refusal = str(error)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(out / DECODER))
    tensors = [network.get_input(at) for at in range(network.num_inputs)]
    sizes = [tensor.name for tensor in tensors if tensor.is_shape_tensor]
    layers = sorted({network.get_layer(at).type.name for at in range(network.num_layers)})
    print(json.dumps([len(engine), len(timings), refusal, sizes, layers]))
"""
TOPK = """
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t"])]
    values += [helper.make_tensor_value_info("k", TensorProto.INT64, [1])]
    results = [helper.make_tensor_value_info("values", TensorProto.FLOAT, ["m"])]
    node = helper.make_node("TopK", ["x", "k"], ["values", "indices"], axis=0)
    graph = helper.make_graph([node], "graph", values, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    for most in map(int, sys.argv[1:]):
        builder = tensorrt_rtx.Builder(logger)
        network = builder.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        assert tensorrt_rtx.OnnxParser(network, logger).parse(model.SerializeToString())
        profile = builder.create_optimization_profile()
        profile.set_shape("x", [1], [most], [most])
        profile.set_shape_input("k", [1], [most], [most])
        config = builder.create_builder_config()
        config.add_optimization_profile(profile)
        print(builder.build_serialized_network(network, config) is not None)
"""
OPEN = """
    from pathlib import Path
    from avl_edge.package.export import Bindings
    from avl_edge.backends.tensorrt import EngineFailed, runner

    runner.register = lambda trt: None  # its networks take no plugins
    try:
        runner.Engine.open(Path(sys.argv[1]), Bindings((), ()))
    except EngineFailed as error:
        print(error)
"""
OF_THE_HOST = {"CONDITION", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT", "LOOP_OUTPUT", "NMS", "NON_ZERO", "TRIP_LIMIT"}
"""Layers for whose results the host waits, so that no CUDA graph can hold them."""
BUILT = {
    "exact rows": ("llama-bias", "float16", 1),
    "packed rows": ("llama-mha", "float16", None),
    "bfloat16, after the first layer": ("qwen2-tied", "bfloat16", 0),
    "float32": ("llama-gqa-full", "float32", 0),
}
"""A checkpoint, the precision, and the layer after which tokens are pruned: one layer follows it, and TensorRT's time
goes by layers."""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    text = textwrap.dedent(AS_TENSORRT) + textwrap.dedent(program)
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "what", [what if what == "exact rows" else pytest.param(what, marks=pytest.mark.long) for what in BUILT]
)
def test_decoder_builds_with_profiles_for_prompt_and_step(tmp_path: Path, what: str) -> None:
    """With the attention node's body it is an engine; without it, and without a plugin, a refusal in one line."""
    name, precision, prune_after = BUILT[what]
    model = make_checkpoint(tmp_path / "model", replace(SPECS[name], layers=2 + (prune_after or 0)))
    done = run(DECODER, str(model), str(tmp_path), precision, json.dumps(prune_after))
    assert done.returncode == 0, done.stderr[-2000:]
    engine, timings, refusal, sizes, layers = json.loads(done.stdout)
    assert engine > 10_000
    assert timings > 0
    assert refusal.startswith("TensorRT cannot build decoder.plugin.onnx: ")
    assert "Plugin not found" in refusal
    assert "\n" not in refusal
    assert sizes == ([] if prune_after is None else ["survivors"])
    assert ("TOPK" in layers) == (prune_after is not None)
    assert not OF_THE_HOST & set(layers)


def test_most_tokens_of_a_prompt_that_prunes() -> None:
    """A recipe refuses what TensorRT would, and no less: its TopK ends there."""
    done = run(TOPK, str(MOST_PRUNED), str(MOST_PRUNED + 1))
    assert [line for line in done.stdout.splitlines() if line in ("True", "False")] == ["True", "False"]
    assert f"K exceeds the maximum value allowed ({MOST_PRUNED})" in done.stdout


def test_engine_is_read_where_it_is_mapped(tmp_path: Path) -> None:
    """By a real runtime, as far as it goes without a GPU."""
    (tmp_path / "an.engine").write_bytes(b"no engine" * 100)
    done = run(OPEN, str(tmp_path / "an.engine"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"TensorRT does not take {tmp_path / 'an.engine'}: build the package again on this device (" in done.stdout
    assert "magicTag" in done.stdout


def test_command_builds_the_vision_engine(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """In bfloat16, which fewest operators know."""
    out = tmp_path / "out"
    done = run(COMMAND, "build", str(checkpoint("llama-bias")), "--out", str(out), "--precision", "bfloat16")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"holds the ONNX graphs and {VISION_ENGINE}; the decoder's engine needs a TensorRT that" in done.stderr
    with open_package(out) as package:
        assert package[VISION_ENGINE].stat().st_size > 10_000
        assert package[TIMINGS].is_file()
        assert package.manifest.fingerprint.platform is not None


class TestWithoutDevice:
    """What TensorRT proper answers and RTX does not, played by a stand-in."""

    @pytest.fixture
    def trt(self) -> MagicMock:
        severity = SimpleNamespace(ERROR=1)
        fake = MagicMock(ILogger=type("ILogger", (), {"__init__": lambda _: None, "Severity": severity}))
        fake.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda _: None})
        fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
        fake.Builder.return_value.create_network.return_value.num_inputs = 0
        fake.Builder.return_value.build_serialized_network.return_value = b"engine"
        return fake

    def test_no_cuda(self, trt: MagicMock) -> None:
        trt.Builder.side_effect = TypeError("pybind11::init(): factory function returned nullptr")
        with pytest.raises(BuildFailed, match=r"TensorRT cannot build vision\.onnx: no reason was given"):
            build_engine(trt, Path("vision.onnx"), (), (), 2**20)

    @pytest.mark.parametrize("accepts", [True, False])
    def test_timings_of_another_machine_are_dropped(self, trt: MagicMock, accepts: bool) -> None:
        config = trt.Builder.return_value.create_builder_config.return_value
        config.create_timing_cache.side_effect = lambda content: MagicMock(serialize=lambda: content + b" and new")
        config.set_timing_cache.side_effect = [accepts, True]
        _, timings = build_engine(trt, Path("vision.onnx"), (), (), 2**20, b"old")
        assert timings == (b"old and new" if accepts else b" and new")


def test_tensorrt_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert find_tensorrt() is None
