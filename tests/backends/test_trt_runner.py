"""The decoder's engine, opened and run: TensorRT and the CUDA driver are played by stand-ins that hold each call to the
rules of the real ones. Numbers are the business of test_trt_plugin.py, names of the calls too."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avl_edge.backends.tensorrt import runner as runners
from avl_edge.backends.tensorrt.runner import Engine, EngineFailed
from avl_edge.errors import BadInput
from avl_edge.package.engine import DECODER_ENGINE, BadPackage, Fingerprint, Job, Recipe, open_package, publish
from avl_edge.package.export import VISION, Bindings, decoder_bindings
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import SPECS

pytest.importorskip("onnx")

SPEC = SPECS["llama-bias"]
STREAM = 7
PROMPT = {"T": 9, "F": 16, "B + 1": 2, "N": 1, "R": 64, "W": 2, "survivors": 6}
STEP = {"T": 2, "F": 1, "B + 1": 3, "N": 30, "R": 64, "W": 0, "survivors": 2}


@pytest.fixture(scope="module")
def spec(checkpoint: Checkpoints) -> Any:
    return Job.of(checkpoint("llama-bias"), Recipe()).spec


class ExecutionContext:
    """An execution context that minds the order of calls, and of what it was given."""

    def __init__(self, engine: Serialized) -> None:
        self.engine, self.log = engine, engine.log
        self.profile: int | None = None
        self.memory = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.changes = 0
        """How often a shape or an address was given."""

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = profile
        return profile < 2

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self.engine.device_memory_size_v2
        self.memory = memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "the profile comes before the shapes"
        self.changes += 1
        self.shapes[name] = shape
        return all(dim <= self.engine.largest for dim in shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        self.addresses[name] = address
        return address != 0 and (name == "survivors" or address % 256 == 0)

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
        self.log, self.wants = log, list(self.names)
        self.contexts: list[ExecutionContext] = []
        self.on_host = {"survivors"} & set(self.names)
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_location(self, name: str) -> str:
        return "host" if name in self.on_host else "device"

    def create_execution_context(self, strategy: str) -> ExecutionContext:
        assert strategy == "user", "contexts of their own memory would hold it twice"
        self.contexts.append(ExecutionContext(self))
        return self.contexts[-1]


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def bindings(spec: Any) -> Bindings:
    return decoder_bindings(spec, "float16", 1)


TRT = SimpleNamespace(
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
    TensorLocation=SimpleNamespace(HOST="host", DEVICE="device"),
)


@pytest.fixture
def engine(bindings: Bindings, log: list[str]) -> Serialized:
    return Serialized(bindings, log)


@pytest.fixture
def decoder(engine: Serialized, bindings: Bindings) -> Engine:
    decoder = Engine(TRT, engine, bindings)
    assert decoder.memory_bytes == 4096
    decoder.take_memory(1024)
    return decoder


@pytest.fixture
def addresses(bindings: Bindings) -> dict[str, int]:
    names = [binding.name for binding in (*bindings.inputs, *bindings.outputs)]
    return {name: 256 * at for at, name in enumerate(names, 1) if name != "survivors"}


class TestContext:
    def test_prompt_and_step(
        self, decoder: Engine, engine: Serialized, addresses: dict[str, int], log: list[str]
    ) -> None:
        prompts, step = decoder.context(0, STREAM), decoder.context(1, STREAM)
        prompts.run(PROMPT, addresses, STREAM)
        step.run(STEP, addresses, STREAM)
        assert log == ["profile 0: T 9, 6 survive", "profile 1: T 2, 2 survive"]
        shapes = engine.contexts[0].shapes
        layers, text = SPEC.layers, SPEC
        assert shapes["rows"] == (layers, 1)
        assert shapes["row_offsets"] == (layers, 2)
        assert shapes["slots"] == (layers, 9)
        assert shapes["score_queries"] == (2,)
        assert shapes["pool_keys"] == (64, text.kv_heads, shapes["pool_keys"][2])
        assert engine.contexts[1].shapes["score_queries"] == (0,)
        assert engine.contexts[0].addresses["logits"] == addresses["logits"]
        assert engine.contexts[0].memory == engine.contexts[1].memory == 1024

    def test_recorded_run_does_nothing_but_run(
        self, decoder: Engine, engine: Serialized, addresses: dict[str, int], log: list[str]
    ) -> None:
        """TensorRT prepares anew for whatever it is given, the same or not: no matter for a recording."""
        step = decoder.context(1, STREAM)
        step.run(STEP, addresses, STREAM)
        changes = engine.contexts[0].changes
        step.run(dict(STEP), dict(addresses), STREAM)
        assert engine.contexts[0].changes == changes
        assert len(log) == 2
        step.run({**STEP, "N": 31}, addresses, STREAM)
        step.run({**STEP, "N": 31}, {**addresses, "logits": 512 * 300}, STREAM)
        assert engine.contexts[0].changes == 3 * changes
        assert engine.contexts[0].addresses["logits"] == 512 * 300

    def test_size_of_one_recording_outlives_the_next(
        self, decoder: Engine, engine: Serialized, addresses: dict[str, int], log: list[str]
    ) -> None:
        """TensorRT reads ``survivors`` where it lies, and a recording may read it again."""
        steps = [decoder.context(1, STREAM) for _ in range(2)]
        for context, batch in zip(steps, (2, 3), strict=True):
            sizes = {"T": batch, "B + 1": batch + 1, "survivors": batch}
            context.run({**STEP, **sizes}, addresses, STREAM)
        for context in engine.contexts:
            context.execute_async_v3(STREAM)
        assert log[2:] == log[:2] == ["profile 1: T 2, 2 survive", "profile 1: T 3, 3 survive"]

    def test_let_go_and_taken_again(
        self, decoder: Engine, engine: Serialized, addresses: dict[str, int], log: list[str]
    ) -> None:
        """There are never more than were in use at once, whoever else is; and the next one binds everything."""
        prompts, step = decoder.context(0, STREAM), decoder.context(1, STREAM)
        step.run(STEP, addresses, STREAM)
        changes = engine.contexts[1].changes
        del step
        another = decoder.context(1, STREAM)
        assert len(engine.contexts) == 2
        another.run(STEP, addresses, STREAM)
        assert engine.contexts[1].changes == 2 * changes
        third = decoder.context(1, STREAM)
        assert len(engine.contexts) == 3
        third.run(STEP, addresses, STREAM)
        assert engine.contexts[2].changes == changes
        prompts.run(PROMPT, addresses, STREAM)
        assert log[-1] == "profile 0: T 9, 6 survive"

    def test_sizes_that_the_engine_was_not_built_for(
        self, decoder: Engine, engine: Serialized, addresses: dict[str, int], log: list[str]
    ) -> None:
        context = decoder.context(0, STREAM)
        with pytest.raises(EngineFailed, match=r"token_ids of shape \[9999\]: the engine was built for other sizes$"):
            context.run({**PROMPT, "T": 9999}, addresses, STREAM)
        changes = engine.contexts[0].changes
        context.run(PROMPT, addresses, STREAM)
        context.run(PROMPT, addresses, STREAM)
        assert len(log) == 2
        assert engine.contexts[0].changes > changes, "what was refused halfway is bound from the beginning"

    def test_address_that_is_refused(self, decoder: Engine, addresses: dict[str, int]) -> None:
        with pytest.raises(EngineFailed, match="does not take the address 0x205 of slots"):
            decoder.context(1, STREAM).run(STEP, {**addresses, "slots": 0x205}, STREAM)

    def test_run_that_fails(
        self, engine: Serialized, bindings: Bindings, addresses: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the reason that TensorRT gave its logger."""
        decoder = Engine(TRT, engine, bindings, ["[error] the plugin\n  returned -1"])
        decoder.take_memory(1024)
        step = decoder.context(1, STREAM)
        monkeypatch.setattr(engine.contexts[0], "execute_async_v3", lambda _: False)
        with pytest.raises(EngineFailed, match=r"cannot run the engine: .* \(\[error\] the plugin returned -1\)$"):
            step.run(STEP, addresses, STREAM)

    def test_missing_address(self, decoder: Engine, addresses: dict[str, int]) -> None:
        del addresses["slots"]
        with pytest.raises(BadInput, match="the engine needs the address of slots"):
            decoder.context(1, STREAM).run(STEP, addresses, STREAM)

    def test_engine_wants_more(self, decoder: Engine, engine: Serialized, addresses: dict[str, int]) -> None:
        engine.wants.append("more")
        with pytest.raises(EngineFailed, match="cannot tell the shapes of the engine without more"):
            decoder.context(1, STREAM).run(STEP, addresses, STREAM)

    def test_profile_that_the_engine_does_not_have(self, decoder: Engine) -> None:
        with pytest.raises(EngineFailed, match="TensorRT cannot make a context: free some memory"):
            decoder.context(2, STREAM)


class TestEngine:
    def test_engine_of_another_graph(self, engine: Serialized, spec: Any) -> None:
        without = decoder_bindings(spec, "float16", None)
        with pytest.raises(EngineFailed, match=r"other inputs and outputs \(kept, pinned, survivors\)"):
            Engine(TRT, engine, without)

    @pytest.mark.parametrize(("on_host", "said"), [(set(), "no input"), ({"slots", "survivors"}, "slots, survivors")])
    def test_size_that_lies_elsewhere(
        self, engine: Serialized, bindings: Bindings, on_host: set[str], said: str
    ) -> None:
        """An address of the one memory is none of the other."""
        engine.on_host = on_host
        with pytest.raises(EngineFailed, match=f"TensorRT reads {said} on the host, and should survivors alone"):
            Engine(TRT, engine, bindings)


class TestOpen:
    """From a package on disk."""

    @pytest.fixture
    def trt(self, monkeypatch: pytest.MonkeyPatch, bindings: Bindings, log: list[str]) -> Any:
        """`tensorrt` as far as opening goes: takes an engine that says so."""

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, content: mmap.mmap) -> Serialized | None:
                if memoryview(content) == b"good":
                    return Serialized(bindings, log)
                self.logger.log(2, "a warning")
                self.logger.log(1, "made for\n another GPU")
                return None

        class ILogger:
            Severity = SimpleNamespace(ERROR=1)

            def __init__(self) -> None:
                pass

        module = SimpleNamespace(Runtime=Runtime, ILogger=ILogger, **vars(TRT))
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
            assert Engine.open(package[DECODER_ENGINE], bindings).memory_bytes == 4096
        assert log == ["register True"], "an engine with an unknown plugin is refused"

    @pytest.mark.usefixtures("trt")
    def test_engine_of_another_machine(self, tmp_path: Path, bindings: Bindings) -> None:
        with (
            self.package(tmp_path / "out", DECODER_ENGINE, b"bad") as package,
            pytest.raises(
                EngineFailed,
                match=r"does not take .*: build the package again on this device \(made for another GPU\)$",
            ),
        ):
            Engine.open(package[DECODER_ENGINE], bindings)

    @pytest.mark.usefixtures("trt")
    def test_graphs_alone(self, tmp_path: Path, bindings: Bindings) -> None:
        with (
            self.package(tmp_path / "out", VISION, b"") as package,
            pytest.raises(BadPackage, match=r"has no decoder\.engine: rebuild it"),
        ):
            Engine.open(package[DECODER_ENGINE], bindings)

    def test_without_tensorrt(self, tmp_path: Path, bindings: Bindings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with (
            self.package(tmp_path / "out", DECODER_ENGINE, b"good") as package,
            pytest.raises(BadInput, match="running an engine needs TensorRT, which comes with JetPack"),
        ):
            Engine.open(package[DECODER_ENGINE], bindings)
