"""The engines' backend against the torch backend: the same answers, rows and statistics, by the exported graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from avl_edge import Formats, Options, Result, Runtime
from avl_edge.attention.cuda import FORMATS
from avl_edge.backends.base import run_whole
from avl_edge.backends.steps import RecordedStep
from avl_edge.backends.tensorrt.backend import EngineBackend
from avl_edge.backends.tensorrt.kernels import digest
from avl_edge.backends.tensorrt.runner import EngineFailed
from avl_edge.package.engine import STEP, Plugin, Recipe
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from tests.equipment.engines_on_cpu import PROMPT, PRUNE_AFTER, RECIPE, SECOND, GraphRunner, Packages, answers, stand_in
from tests.equipment.pixels import as_pictures
from tests.equipment.prompts_first import STEPPED
from tools.gpu import engines
from tools.gpu.dut import CheckFailed
from tools.gpu.report import Skipped

METHODS = {
    "full": Options(method="full"),
    "A-VL": Options(method="avl", parameters={"prune_layer": PRUNE_AFTER, "prefill_keep": 60, "text_floor": 4}),
    "A-VL by drift": Options(method="avl", parameters={"prefill_keep": 100, "prompt_mean": 1, "drift": 5}),
    "A-VL by values": Options(
        method="avl", parameters={"prefill_keep": 100, "by_values": 1, "secondary": 20, "core": 9}
    ),
    "FastV": Options(method="fastv", parameters={"layer": PRUNE_AFTER + 1, "drop": 30}),
    "H2O": Options(method="h2o"),
    "StreamingLLM": Options(method="streaming"),
    "distinct": Options(method="distinct", parameters={"secondary": 30}),
}


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture
def package(checkpoint: Checkpoints, tmp_path: Path) -> Packages:
    return Packages(checkpoint, tmp_path)


@pytest.mark.parametrize("name", ["llama-gqa-full", "qwen2-tied"])
@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_the_cpu(package: Packages, checkpoint: Checkpoints, name: str, method: str) -> None:
    """Token by token, with as many rows stored and read and as many refreshes."""
    options = METHODS[method]
    built = Runtime.load(package(name), **STEPPED)
    expected = answers(Runtime.load(checkpoint(name, dtype=torch.float32), **STEPPED), options)
    found = answers(built, options)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    for ours, oracle in zip(found, expected, strict=True):
        assert ours.backend == "tensorrt"
        assert ours.kv == oracle.kv
    assert built.kv_bytes_in_use == 0


def test_who_prunes_after_the_last_layer_prunes_nothing(package: Packages, checkpoint: Checkpoints) -> None:
    built = Runtime.load(package(recipe=replace(RECIPE, prune_after="never")), **STEPPED)
    last = built.spec.text.layers - 1
    options = Options(method="avl", parameters={"prune_layer": last, "prefill_keep": 60}, max_new_tokens=6)
    expected = answers(
        Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float32), **STEPPED),
        options,
    )
    found = answers(built, options)
    assert [(each.token_ids, each.kv) for each in found] == [(each.token_ids, each.kv) for each in expected]


PACKED = {
    "full": (Options(method="full", formats=Formats("int8", "int8", "int8")),),
    "int4": (Options(method="full", formats=Formats("int4", "int4", "int4")),),
    "tiers": (
        Options(
            method="avl",
            parameters={"prefill_keep": 100, "prompt_mean": 1, "refresh": 2},
            formats=Formats("exact", "int8", "int4"),
        ),
    ),
    "mixed": (
        Options(method="h2o", formats=Formats("int4", "exact", "exact")),
        Options(method="full"),
        Options(method="distinct", parameters={"secondary": 30}, formats=Formats("int8", "int4", "int4")),
    ),
}


@pytest.mark.parametrize(
    ("name", "what"),
    [*(("llama-gqa-full", what) for what in PACKED), *(("qwen2-outliers", what) for what in ("int4", "mixed"))],
)
def test_answers_over_packed_rows_are_those_of_the_cpu(
    package: Packages, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    """By the graphs in float32, whose packed rows no kernel of a GPU reads: to compare tokens. Also of keys that a few
    channels outweigh.

    Two programs in float32 part in the last bits. Where such a bit decides to which number a new row is rounded, an
    answer may go its own way: one of three, and not at its beginning.
    """
    monkeypatch.setattr("avl_edge.backends.tensorrt.target.decoder_formats", lambda *_: tuple(FORMATS))
    options = [replace(each, max_new_tokens=24) for each in PACKED[what] * (3 // len(PACKED[what]))]
    runtimes = (
        Runtime.load(package(name), **STEPPED),
        Runtime.load(checkpoint(name, dtype=torch.float32), **STEPPED),
    )
    found, expected = (_each_its_own(runtime, options) for runtime in runtimes)
    assert [each.token_ids[:8] for each in found] == [each.token_ids[:8] for each in expected]
    assert sum(ours.token_ids == oracle.token_ids for ours, oracle in zip(found, expected, strict=True)) >= 2
    assert [each.kv for each in found] == [each.kv for each in expected]
    assert runtimes[0].kv_bytes_in_use == 0


def _each_its_own(runtime: Runtime, options: Sequence[Options]) -> list[Result]:
    """Answers of requests that run together, each with options of its own."""
    running = [runtime.generate([random_image(seed, 60)], PROMPT, own) for seed, own in enumerate(options)]
    return [generation.result() for generation in running]


def test_packed_rows_in_half_precision(package: Packages, checkpoint: Checkpoints) -> None:
    """As an engine serves them; the answers begin as the CPU's do."""
    options = Options(method="full", formats=Formats("int8", "int8", "int8"), max_new_tokens=6)
    runtime = Runtime.load(package(dtype=torch.float16), **STEPPED)
    expected = answers(
        Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float16), **STEPPED),
        options,
    )
    found = answers(runtime, options)
    assert [each.token_ids[0] for each in found] == [each.token_ids[0] for each in expected]
    assert [each.kv for each in found] == [each.kv for each in expected]
    decoder = runtime.debug.backend.engines.decoder  # type: ignore[union-attr]
    assert {dims["P * T"] // dims["T"] for profile, dims in decoder.runs if profile == STEP and dims["T"] > 1} == {2}


def test_sampled_answers_are_those_of_the_cpu(package: Packages, checkpoint: Checkpoints) -> None:
    options = Options(method="full", temperature=0.8, seed=5, max_new_tokens=6)
    expected = answers(
        Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float32), **STEPPED),
        options,
    )
    assert [each.token_ids for each in answers(Runtime.load(package(), **STEPPED), options)] == [
        each.token_ids for each in expected
    ]


def test_half_precision(package: Packages, checkpoint: Checkpoints) -> None:
    """As the graphs compute it; the rows of the pool are as wide."""
    options = Options(method="avl", parameters={"prefill_keep": 100}, max_new_tokens=6)
    runtime = Runtime.load(package(dtype=torch.float16), **STEPPED)
    assert runtime.kv_shape.itemsize == 2
    expected = answers(
        Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float16), **STEPPED),
        options,
    )
    assert [each.token_ids for each in answers(runtime, options)] == [each.token_ids for each in expected]


def test_a_step_is_recorded_once_for_each_bucket(package: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    """And greedy tokens come back alone, without the logits."""
    monkeypatch.setattr(RecordedStep, "logits", property(lambda _: pytest.fail("the logits came back")))
    runtime = Runtime.load(package(), **STEPPED)
    for _ in range(2):
        answers(runtime, Options(method="h2o", max_new_tokens=6))
    device = runtime.debug.backend.accelerator  # type: ignore[union-attr]
    decoder = runtime.debug.backend.engines.decoder  # type: ignore[union-attr]
    steps = [dims for profile, dims in decoder.runs if profile == STEP and dims["T"] > 1]
    shapes = {tuple(sorted(dims.items())) for dims in steps}
    assert device.log.count("record") == len(shapes) == 1
    assert device.log.count("replay") == 2 * 5
    assert steps[0]["T"] == 4, "three sequences take the room of four"


def test_a_recording_has_a_context_of_its_own(package: Packages) -> None:
    """Of which the contexts themselves see to it that nobody binds them anew; prompts share one."""
    runtime = Runtime.load(package(), **STEPPED)
    decoder = runtime.debug.backend.engines.decoder  # type: ignore[union-attr]
    del decoder.contexts[:]
    for prompts in ((PROMPT,), (PROMPT, SECOND), (PROMPT, SECOND, PROMPT)) * 2:
        pictures = [random_image(1, 60)]
        running = [runtime.generate(pictures, prompt, Options(method="h2o", max_new_tokens=3)) for prompt in prompts]
        assert all(each.result().token_ids for each in running)
    recorded = runtime.debug.backend.accelerator.log.count("record")  # type: ignore[union-attr]
    assert decoder.contexts == [STEP] * recorded
    assert recorded >= 3


class TestRowsThatDoNotArrive:
    """A plugin that writes into a copy of the pool: the rows of a step are looked for before anything is answered."""

    @pytest.mark.parametrize("lost", [0, 3])
    def test_in_one_layer(self, package: Packages, monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
        written = GraphRunner.write_rows

        def write(self: GraphRunner, inputs: Any, *others: Any) -> None:
            inputs["slots"][lost] = -1
            written(self, inputs, *others)

        monkeypatch.setattr(GraphRunner, "write_rows", write)
        with pytest.raises(EngineFailed, match=rf"layer {lost}'s new row is not in the pool: this TensorRT copies"):
            Runtime.load(package(), **STEPPED)

    def test_where_an_earlier_program_left_the_same_rows(
        self, package: Packages, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = Runtime.load(package(), **STEPPED).debug.backend
        assert backend is not None
        backend.require_rows()  # type: ignore[attr-defined]
        monkeypatch.setattr(GraphRunner, "write_rows", lambda *_: None)
        with pytest.raises(EngineFailed, match="layer 0's new row is not in the pool"):
            backend.require_rows()  # type: ignore[attr-defined]


def test_more_sequences_than_a_step_has_room_for(package: Packages, checkpoint: Checkpoints) -> None:
    options = Options(method="full", max_new_tokens=6)
    expected = answers(
        Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float32), **STEPPED),
        options,
    )
    for sequences, temperature in ((1, 0.0), (2, 0.0), (2, 0.7)):
        runtime = Runtime.load(
            package(recipe=Recipe(sequences=sequences, prune_after="never", pool_rows=8192)), threaded=False
        )
        found = answers(runtime, Options(method="full", max_new_tokens=6, temperature=temperature))
        assert all(len(each.token_ids) == 6 for each in found)
        if not temperature:
            assert [each.token_ids for each in found] == [each.token_ids for each in expected]


def test_pictures_are_encoded_as_many_at_a_time_as_fit(package: Packages) -> None:
    runtime = Runtime.load(package(recipe=Recipe(images=1, prune_after="never", pool_rows=8192)), **STEPPED)
    assert runtime.debug.backend is not None
    spec = runtime.spec.vision
    pixels = as_pictures(runtime.spec, torch.randn(3, 3, spec.image_size, spec.image_size).numpy())
    together = run_whole(runtime.debug.backend.begin_encode(pixels))
    alone = [run_whole(runtime.debug.backend.begin_encode(pixels[at : at + 1])) for at in range(3)]
    torch.testing.assert_close(together.tokens, torch.cat([each.tokens for each in alone]), rtol=0, atol=0)


@pytest.mark.long
def test_check_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/gpu's check of engines: the demo model, as ONNX Runtime takes it, against the CPU's bfloat16."""
    monkeypatch.setattr(engines, "decoder_plugin", lambda: None)
    with pytest.raises(Skipped, match="there is no tensorrt that takes plugins"):
        engines.check_engines()
    monkeypatch.setattr(engines, "decoder_plugin", lambda: Plugin(digest(), lambda _: None))
    # ONNX Runtime looks at all of a pool at each step.
    monkeypatch.setattr(engines, "RECIPE", replace(engines.RECIPE, pool_rows=8192))
    prefixes = 3 * 3 + 2 * 3
    assert engines.check_engines("float16")["answers"] == 12 + 2 * 3 + prefixes, "exact rows, and two packed formats"
    monkeypatch.setattr(GraphRunner, "write_rows", lambda *_: None)
    monkeypatch.setattr(EngineBackend, "require_rows", lambda _: None)
    monkeypatch.setattr(engines, "METHODS", ("full", "h2o"))
    monkeypatch.setattr(engines, "OF_SESSIONS", (("full", {}),))
    with pytest.raises(CheckFailed, match="of 9 answers are not the CPU's"):
        engines.check_engines("float32")
