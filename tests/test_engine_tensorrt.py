"""Graphs through a real TensorRT parser and builder: TensorRT-RTX, which needs no GPU to build and has the same calls.

Each build is a process of its own, since TensorRT may abort the one that it is in.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from avl_edge.engine import TIMINGS, VISION_ENGINE, BuildFailed, build_engine, find_tensorrt, open_package
from tests.conftest import Checkpoints

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
    from avl_edge.engine import BuildFailed, Recipe, build_engine, decoder_profiles, find_tensorrt
    from avl_edge.export import DECODER, PLUGIN_DECODER, Settings, decoder_bindings, export_model
    from avl_edge.spec import read_spec

    model, out, precision = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    spec = read_spec(model)
    export_model(spec, model, out, Settings(precision, 1))
    profiles = decoder_profiles(spec, Recipe(prompt_tokens=100, sequences=4, pool_rows=512), precision)
    seen = []

    def build(name):
        arguments = decoder_bindings(spec, precision, 1).inputs, profiles, 2**28, b"", lambda *at: seen.append(at)
        return build_engine(find_tensorrt(), out / name, *arguments)

    engine, timings = build(DECODER)
    assert len(seen) > 10 and all(done <= total for done, total in seen)
    try:
        build(PLUGIN_DECODER)
    except BuildFailed as error:
        print(json.dumps([len(engine), len(timings), str(error)]))
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    text = textwrap.dedent(AS_TENSORRT) + textwrap.dedent(program)
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["llama-bias", "llama-mha"])
def test_decoder_builds_with_profiles_for_prompt_and_step(checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    """With the attention node's body it is an engine, for exact rows and for packed ones; without it, and without a
    plugin, a refusal in one line."""
    done = run(DECODER, str(checkpoint(name)), str(tmp_path), "float16")
    assert done.returncode == 0, done.stderr[-2000:]
    engine, timings, refusal = json.loads(done.stdout)
    assert engine > 10_000
    assert timings > 0
    assert refusal.startswith("TensorRT cannot build decoder.plugin.onnx: ")
    assert "Plugin not found" in refusal
    assert "\n" not in refusal


def test_command_builds_the_vision_engine(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """In bfloat16, which fewest operators know."""
    out = tmp_path / "out"
    done = run(COMMAND, "build", str(checkpoint("llama-bias")), "--out", str(out), "--precision", "bfloat16")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"holds the ONNX graphs and {VISION_ENGINE}; the decoder's engine needs a TensorRT that" in done.stderr
    with open_package(out) as package:
        assert package[VISION_ENGINE].stat().st_size > 10_000
        assert package[TIMINGS].is_file()
        assert package.manifest.fingerprint.target is not None


class TestWithoutDevice:
    """What TensorRT proper answers and RTX does not, played by a stand-in."""

    @pytest.fixture
    def trt(self) -> MagicMock:
        fake = MagicMock(ILogger=type("ILogger", (), {"__init__": lambda _: None}))
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
