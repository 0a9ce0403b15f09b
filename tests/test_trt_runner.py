"""The decoder's engine, built and run: TensorRT and the CUDA driver are played by stand-ins that hold each call to the
rules of the real ones. Numbers are the business of test_trt_plugin.py, names of the calls too."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avl_edge.cli.build import _engines
from avl_edge.engine import (
    DECODER_ENGINE,
    TIMINGS,
    VISION_ENGINE,
    BadPackage,
    BadRecipe,
    Fingerprint,
    Job,
    Plugin,
    Recipe,
    build,
    decoder_formats,
    decoder_profiles,
    open_package,
    publish,
)
from avl_edge.errors import BadInput
from avl_edge.export import PLUGIN_DECODER, VISION, Bindings, decoder_bindings
from avl_edge.trt import Engine, EngineFailed, PluginMissing, decoder_plugin, digest
from avl_edge.trt import runner as runners
from tests.checkpoints import SPECS
from tests.conftest import Checkpoints

pytest.importorskip("onnx")

SPEC = SPECS["llama-bias"]
STREAM = 7
PROMPT = {"T": 9, "F": 16, "B + 1": 2, "N": 1, "R": 64, "W": 2, "survivors": 6}
STEP = {"T": 2, "F": 1, "B + 1": 3, "N": 30, "R": 64, "W": 0, "survivors": 2}


@pytest.fixture(scope="module")
def spec(checkpoint: Checkpoints) -> Any:
    return Job.of(checkpoint("llama-bias"), Recipe()).spec


class Context:
    """An execution context that minds the order of calls, and of what it was given."""

    def __init__(self, engine: Serialized, log: list[str]) -> None:
        self.engine, self.log = engine, log
        self.profile: int | None = None
        self.memory = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = profile
        return profile < 2

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self.engine.device_memory_size_v2
        self.memory = memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return all(dim <= self.engine.largest for dim in shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.wants if name not in self.addresses]

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        assert self.memory, "it has no memory to work in"
        survivors = ctypes.c_int64.from_address(self.addresses["survivors"]).value
        self.log.append(f"profile {self.profile}: T {self.shapes['token_ids'][0]}, {survivors} survive")
        return True


class Serialized:
    device_memory_size_v2 = 4096
    largest = 4096

    def __init__(self, bindings: Bindings, log: list[str]) -> None:
        self.names = [binding.name for binding in (*bindings.inputs, *bindings.outputs)]
        self.log, self.wants, self.contexts = log, list(self.names), []
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "user", "contexts of their own memory would hold it twice"
        self.contexts.append(Context(self, self.log))
        return self.contexts[-1]


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def bindings(spec: Any) -> Bindings:
    return decoder_bindings(spec, "float16", 1)


TRT = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"))


@pytest.fixture
def decoder(bindings: Bindings, log: list[str]) -> Engine:
    decoder = Engine(TRT, Serialized(bindings, log), bindings, 2, STREAM)
    assert decoder.memory_bytes == 4096
    decoder.take_memory(1024)
    return decoder


@pytest.fixture
def addresses(bindings: Bindings) -> dict[str, int]:
    names = [binding.name for binding in (*bindings.inputs, *bindings.outputs)]
    return {name: 256 * at for at, name in enumerate(names, 1) if name != "survivors"}


class TestEngine:
    def test_prompt_and_step(self, decoder: Engine, addresses: dict[str, int], log: list[str]) -> None:
        decoder.run(0, PROMPT, addresses, STREAM)
        decoder.run(1, STEP, addresses, STREAM)
        assert log == ["profile 0: T 9, 6 survive", "profile 1: T 2, 2 survive"]
        shapes = decoder._contexts[0].shapes
        layers, text = SPEC.layers, SPEC
        assert shapes["rows"] == (layers, 1)
        assert shapes["row_offsets"] == (layers, 2)
        assert shapes["slots"] == (layers, 9)
        assert shapes["score_queries"] == (2,)
        assert shapes["pool_keys"] == (64, text.kv_heads, shapes["pool_keys"][2])
        assert decoder._contexts[1].shapes["score_queries"] == (0,)
        assert decoder._contexts[0].addresses["logits"] == addresses["logits"]

    def test_sizes_that_the_engine_was_not_built_for(self, decoder: Engine, addresses: dict[str, int]) -> None:
        with pytest.raises(EngineFailed, match=r"token_ids of shape \[9999\]: the engine was built for other sizes"):
            decoder.run(0, {**PROMPT, "T": 9999}, addresses, STREAM)

    def test_run_that_is_refused(
        self, decoder: Engine, addresses: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decoder._contexts[1], "execute_async_v3", lambda _: False)
        with pytest.raises(EngineFailed, match="TensorRT does not take the engine's run"):
            decoder.run(1, STEP, addresses, STREAM)

    def test_missing_address(self, decoder: Engine, addresses: dict[str, int]) -> None:
        del addresses["slots"]
        with pytest.raises(BadInput, match="the engine needs the address of slots"):
            decoder.run(1, STEP, addresses, STREAM)

    def test_engine_wants_more(self, decoder: Engine, addresses: dict[str, int]) -> None:
        decoder._engine.wants.append("more")
        with pytest.raises(EngineFailed, match="cannot tell the shapes of the engine without more"):
            decoder.run(1, STEP, addresses, STREAM)

    def test_engine_of_another_graph(self, bindings: Bindings, spec: Any, log: list[str]) -> None:
        without = decoder_bindings(spec, "float16", None)
        with pytest.raises(EngineFailed, match=r"other inputs and outputs \(kept, pinned, survivors\)"):
            Engine(TRT, Serialized(bindings, log), without, 2, STREAM)


class TestOpen:
    """From a package on disk."""

    @pytest.fixture
    def trt(self, monkeypatch: pytest.MonkeyPatch, bindings: Bindings, log: list[str]) -> Any:
        """`tensorrt` as far as opening goes: takes an engine that says so."""

        class Runtime:
            def __init__(self, logger: object) -> None:
                assert logger == "logger"

            def deserialize_cuda_engine(self, content: bytes) -> Serialized | None:
                return Serialized(bindings, log) if content == b"good" else None

        class Logger:
            ERROR = 1

            def __new__(cls, level: int) -> Any:
                assert level == cls.ERROR
                return "logger"

        module = SimpleNamespace(Runtime=Runtime, Logger=Logger, **vars(TRT))
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(runners, "register", lambda given: log.append(f"register {given is module}"))
        return module

    def package(self, out: Path, name: str, content: bytes) -> Any:
        def fill(staging: Path) -> Fingerprint:
            (staging / name).write_bytes(content)
            return Fingerprint("model", "graphs", "float16", None, {})

        publish(out, "1.0", fill)
        return open_package(out)

    @pytest.mark.usefixtures("trt")
    def test_open(self, tmp_path: Path, bindings: Bindings, log: list[str]) -> None:
        with self.package(tmp_path / "out", DECODER_ENGINE, b"good") as package:
            assert Engine.open(package[DECODER_ENGINE], bindings, 2, STREAM).memory_bytes == 4096
        assert log == ["register True"], "an engine with an unknown plugin is refused"

    @pytest.mark.usefixtures("trt")
    def test_engine_of_another_machine(self, tmp_path: Path, bindings: Bindings) -> None:
        with (
            self.package(tmp_path / "out", DECODER_ENGINE, b"bad") as package,
            pytest.raises(EngineFailed, match=r"does not take .*decoder\.engine: build the package again"),
        ):
            Engine.open(package[DECODER_ENGINE], bindings, 2, STREAM)

    @pytest.mark.usefixtures("trt")
    def test_graphs_alone(self, tmp_path: Path, bindings: Bindings) -> None:
        with (
            self.package(tmp_path / "out", VISION, b"") as package,
            pytest.raises(BadPackage, match=r"has no decoder\.engine: rebuild it"),
        ):
            Engine.open(package[DECODER_ENGINE], bindings, 2, STREAM)

    def test_without_tensorrt(self, tmp_path: Path, bindings: Bindings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with (
            self.package(tmp_path / "out", DECODER_ENGINE, b"good") as package,
            pytest.raises(BadInput, match="running an engine needs TensorRT, which comes with JetPack"),
        ):
            Engine.open(package[DECODER_ENGINE], bindings, 2, STREAM)


class TestBuild:
    """`build` with a TensorRT that takes plugins; what it builds is the name of what it was given."""

    @pytest.fixture
    def seen(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        seen: list[Any] = []

        def build_engine(
            trt: Any, graph: Path, inputs: Any, profiles: Any, workspace: int, timings: bytes, progress: Any
        ) -> tuple[bytes, bytes]:
            assert (trt, progress) == ("trt", None)
            assert graph.is_file()
            seen.append((graph.name, [binding.name for binding in inputs], profiles, workspace, timings))
            return graph.name.encode(), timings + b"+" + graph.name.encode()

        monkeypatch.setattr("avl_edge.engine.job.build_engine", build_engine)
        monkeypatch.setattr("avl_edge.engine.job.find_tensorrt", lambda: "trt")
        return seen

    def test_both_engines(self, seen: list[Any], checkpoint: Checkpoints, tmp_path: Path) -> None:
        job, out, known = Job.of(checkpoint("llama-bias"), Recipe(prune_after=1)), tmp_path / "out", []
        plugin = Plugin("kernels", known.append)
        manifest, built = build(job, out, "1.0", None, plugin)
        assert built
        assert known == ["trt"]
        assert [name for name, *_ in seen] == [VISION, PLUGIN_DECODER]
        assert seen[1][1][:2] == ["token_ids", "features"]
        assert seen[1][2] == decoder_profiles(job.spec, job.recipe, job.settings.precision)
        assert seen[1][4] == b"+vision.onnx", "the decoder's build knows the times of the vision tower's"
        assert manifest.fingerprint.target is not None
        assert manifest.fingerprint.target.kernel == "kernels"
        with open_package(out) as package:
            assert package[VISION_ENGINE].read_bytes() == b"vision.onnx"
            assert package[DECODER_ENGINE].read_bytes() == b"decoder.plugin.onnx"
            assert package[TIMINGS].read_bytes() == b"+vision.onnx+decoder.plugin.onnx"
        assert not build(job, out, "1.0", None, plugin)[1]
        assert build(job, out, "1.0", None, Plugin("other kernels", known.append))[1], "another kernel, another engine"
        assert len(seen) == 4

    def test_what_the_command_says(self, seen: list[Any], checkpoint: Checkpoints, tmp_path: Path) -> None:
        job = Job.of(checkpoint("llama-bias"), Recipe())
        for plugin, text in (
            (Plugin("kernels", lambda _: None), ", vision.engine and decoder.engine"),
            (None, " and vision.engine; the decoder's engine needs a TensorRT that takes plugins"),
        ):
            manifest, _ = build(job, tmp_path / "out", "1.0", None, plugin)
            assert _engines(manifest) == text
        assert len(seen) == 3

    def test_without_plugins(self, seen: list[Any], checkpoint: Checkpoints, tmp_path: Path) -> None:
        manifest, _ = build(Job.of(checkpoint("llama-bias"), Recipe()), tmp_path / "out", "1.0")
        assert [name for name, *_ in seen] == [VISION]
        assert DECODER_ENGINE not in manifest.files

    def test_plugin_that_is_refused_leaves_nothing(
        self, seen: list[Any], checkpoint: Checkpoints, tmp_path: Path
    ) -> None:
        def refuse(_: Any) -> None:
            raise PluginMissing("TensorRT 10.3.0 refused the plugin")

        with pytest.raises(PluginMissing):
            build(Job.of(checkpoint("llama-bias"), Recipe()), tmp_path / "out", "1.0", None, Plugin("kernels", refuse))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]
        assert len(seen) == 1


class TestProfiles:
    @pytest.mark.parametrize("precision", ["float16", "float32"])
    def test_every_dimension_has_its_sizes_in_order(self, spec: Any, precision: str) -> None:
        recipe = Recipe(prompt_tokens=100, sequences=4)
        for profile in decoder_profiles(spec, recipe, precision):
            for binding in decoder_bindings(spec, precision, 1).inputs:
                for dim in (*binding.shape, *(("survivors",) if binding.name == "survivors" else ())):
                    if isinstance(dim, str):
                        low, usual, high = profile[dim]
                        assert 0 <= low <= usual <= high
                        assert high >= 1

    def test_packed_rows_are_for_steps_of_16_bits(self, checkpoint: Checkpoints) -> None:
        """A part more for each format, and a pool of which both views are as large."""
        recipe, text = Recipe(sequences=4, pool_rows=640), SPECS["llama-mha"]
        spec = Job.of(checkpoint("llama-mha"), recipe).spec
        for precision, parts in (("float16", 3), ("bfloat16", 3), ("float32", 1)):
            assert len(decoder_formats(spec, precision)) == parts
            prompt, step = decoder_profiles(spec, recipe, precision)
            assert prompt["P * T"] == prompt["T"]
            assert prompt["P * B + 1"] == prompt["B + 1"]
            assert step["P * T"] == (1, 1, parts * 4)
            assert step["P * B + 1"] == (2, 2, parts * 4 + 1)
            arena = 640 * text.kv_heads * text.head_dim * (4 if precision == "float32" else 2)
            assert prompt["U"] == step["U"] == (1, arena // 16, arena // 16)

    def test_pool_is_bounded_by_what_a_tensor_may_hold(self, checkpoint: Checkpoints) -> None:
        job = Job.of(checkpoint("llama-bias"), Recipe(pool_rows=2**40))
        text = job.spec.text
        assert 2**31 - text.kv_heads * text.head_dim <= job.recipe.pool_rows * text.kv_heads * text.head_dim < 2**31

    def test_pool_without_rows(self) -> None:
        with pytest.raises(BadRecipe, match="pool_rows 0 must be a whole number from 1"):
            Recipe(pool_rows=0)


class TestDecoderPlugin:
    def test_of_tensorrt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network = SimpleNamespace(add_plugin_v3=None)
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(INetworkDefinition=network))
        plugin = decoder_plugin()
        assert plugin is not None
        assert plugin.digest == digest()

    def test_not_where_plugins_are_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(INetworkDefinition=object))
        assert decoder_plugin() is None
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        assert decoder_plugin() is None
