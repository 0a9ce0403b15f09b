"""The engines' backend against the torch backend: the same answers, rows and statistics, by the exported graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from avl_edge import BadInput, DoesNotFit, Formats, Options, Result, Runtime
from avl_edge.cli import run_app
from avl_edge.cuda import FORMATS
from avl_edge.engine import STEP, BadPackage, Job, Mismatch, Plugin, Recipe, build
from avl_edge.trt import EngineFailed, digest
from avl_edge.trt_backend import EngineBackend
from tests.checkpoints import random_image
from tests.conftest import Checkpoints
from tests.cuda_on_cpu import HostDevice

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from tests.engines_on_cpu import GraphRunner
from tools.gpu import engines
from tools.gpu.place import CheckFailed
from tools.gpu.report import Skipped

PROMPT = "What is shown in this picture, and where?"
SECOND = "Name it."
PRUNE_AFTER = 1
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
RECIPE = Recipe(prune_after=PRUNE_AFTER, images=2, prompt_tokens=200, sequences=4, pool_rows=8192)


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and TensorRT, as far as building and opening go."""
    monkeypatch.setattr("avl_edge.engine.job.find_tensorrt", lambda: "trt")
    monkeypatch.setattr("avl_edge.engine.job.build_engine", lambda *_: (b"an engine", b"its times"))
    monkeypatch.setattr("avl_edge.places.tensorrt.CudaDevice", HostDevice)
    monkeypatch.setattr("avl_edge.places.tensorrt.Engine", GraphRunner)


@pytest.fixture
def package(checkpoint: Checkpoints, tmp_path: Path) -> Callable[..., Path]:
    """``package(name, recipe, dtype)``: a random checkpoint as a package; gives its directory."""

    def make(name: str = "llama-gqa-full", recipe: Recipe = RECIPE, dtype: torch.dtype = torch.float32) -> Path:
        out = tmp_path / f"{name}-{recipe.sequences}-{recipe.prune_after}"
        job = Job.of(checkpoint(name, dtype=dtype), recipe)
        build(job, out, "1.0", None, Plugin(digest(), lambda _: None))
        return out

    return make


def answers(runtime: Runtime, options: Options, prompts: tuple[str, ...] = (PROMPT, SECOND, PROMPT)) -> list[Result]:
    """Those of several requests that run together: about one picture, another, and both."""
    pictures = ([random_image(1, 60)], [random_image(2, 40)], [random_image(1, 60), random_image(2, 40)])
    running = [runtime.generate(images, prompt, options) for images, prompt in zip(pictures, prompts, strict=True)]
    return [generation.result() for generation in running]


@pytest.mark.parametrize("name", ["llama-gqa-full", "qwen2-tied"])
@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_the_cpu(
    package: Callable[..., Path], checkpoint: Checkpoints, name: str, method: str
) -> None:
    """Token by token, with as many rows stored and read and as many refreshes."""
    options = METHODS[method]
    built = Runtime.load(package(name))
    expected = answers(Runtime.load(checkpoint(name, dtype=torch.float32)), options)
    found = answers(built, options)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    for ours, oracle in zip(found, expected, strict=True):
        assert ours.backend == "tensorrt"
        assert ours.kv == oracle.kv
    assert built.kv_bytes_in_use == 0


def test_who_prunes_after_the_last_layer_prunes_nothing(package: Callable[..., Path], checkpoint: Checkpoints) -> None:
    built = Runtime.load(package(recipe=replace(RECIPE, prune_after="never")))
    last = built.spec.text.layers - 1
    options = Options(method="avl", parameters={"prune_layer": last, "prefill_keep": 60}, max_new_tokens=6)
    expected = answers(Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float32)), options)
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


@pytest.mark.parametrize("what", PACKED)
def test_answers_over_packed_rows_are_those_of_the_cpu(
    package: Callable[..., Path], checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """By the graphs in float32, whose packed rows no kernel of a GPU reads: to compare tokens.

    Two programs in float32 part in the last bits. Where such a bit decides to which number a new row is rounded, an
    answer may go its own way: one of three, and not at its beginning.
    """
    monkeypatch.setattr("avl_edge.places.tensorrt.decoder_formats", lambda *_: tuple(FORMATS))
    options = [replace(each, max_new_tokens=24) for each in PACKED[what] * (3 // len(PACKED[what]))]
    runtimes = Runtime.load(package()), Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float32))
    found, expected = (_each_its_own(runtime, options) for runtime in runtimes)
    assert [each.token_ids[:8] for each in found] == [each.token_ids[:8] for each in expected]
    assert sum(ours.token_ids == oracle.token_ids for ours, oracle in zip(found, expected, strict=True)) >= 2
    assert [each.kv for each in found] == [each.kv for each in expected]
    assert runtimes[0].kv_bytes_in_use == 0


def _each_its_own(runtime: Runtime, options: Sequence[Options]) -> list[Result]:
    """Answers of requests that run together, each with options of its own."""
    running = [runtime.generate([random_image(seed, 60)], PROMPT, own) for seed, own in enumerate(options)]
    return [generation.result() for generation in running]


def test_packed_rows_in_half_precision(package: Callable[..., Path], checkpoint: Checkpoints) -> None:
    """As an engine serves them; the answers begin as the CPU's do."""
    options = Options(method="full", formats=Formats("int8", "int8", "int8"), max_new_tokens=6)
    runtime = Runtime.load(package(dtype=torch.float16))
    expected = answers(Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float16)), options)
    found = answers(runtime, options)
    assert [each.token_ids[0] for each in found] == [each.token_ids[0] for each in expected]
    assert [each.kv for each in found] == [each.kv for each in expected]
    decoder = runtime._backend._engines.decoder  # type: ignore[union-attr]
    assert {dims["P * T"] // dims["T"] for profile, dims in decoder.runs if profile == STEP and dims["T"] > 1} == {2}


def test_sampled_answers_are_those_of_the_cpu(package: Callable[..., Path], checkpoint: Checkpoints) -> None:
    options = Options(method="full", temperature=0.8, seed=5, max_new_tokens=6)
    expected = answers(Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float32)), options)
    assert [each.token_ids for each in answers(Runtime.load(package()), options)] == [
        each.token_ids for each in expected
    ]


def test_half_precision(package: Callable[..., Path], checkpoint: Checkpoints) -> None:
    """As the graphs compute it; the rows of the pool are as wide."""
    options = Options(method="avl", parameters={"prefill_keep": 100}, max_new_tokens=6)
    runtime = Runtime.load(package(dtype=torch.float16))
    assert runtime.kv_shape.itemsize == 2
    expected = answers(Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float16)), options)
    assert [each.token_ids for each in answers(runtime, options)] == [each.token_ids for each in expected]


def test_a_step_is_recorded_once_for_each_bucket(package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """And greedy tokens come back alone, without the logits."""
    monkeypatch.setattr(EngineBackend, "decode", lambda *_: pytest.fail("the logits came back"))
    runtime = Runtime.load(package())
    for _ in range(2):
        answers(runtime, Options(method="h2o", max_new_tokens=6))
    device = runtime._backend._accelerator  # type: ignore[union-attr]
    decoder = runtime._backend._engines.decoder  # type: ignore[union-attr]
    steps = [dims for profile, dims in decoder.runs if profile == STEP and dims["T"] > 1]
    shapes = {tuple(sorted(dims.items())) for dims in steps}
    assert device.log.count("record") == len(shapes) == 1
    assert device.log.count("replay") == 2 * 5
    assert steps[0]["T"] == 4, "three sequences take the room of four"


def test_a_recording_has_a_context_of_its_own(package: Callable[..., Path]) -> None:
    """Of which the contexts themselves see to it that nobody binds them anew; prompts share one."""
    runtime = Runtime.load(package())
    decoder = runtime._backend._engines.decoder  # type: ignore[union-attr]
    del decoder.contexts[:]
    for prompts in ((PROMPT,), (PROMPT, SECOND), (PROMPT, SECOND, PROMPT)) * 2:
        pictures = [random_image(1, 60)]
        running = [runtime.generate(pictures, prompt, Options(method="h2o", max_new_tokens=3)) for prompt in prompts]
        assert all(each.result().token_ids for each in running)
    recorded = runtime._backend._accelerator.log.count("record")  # type: ignore[union-attr]
    assert decoder.contexts == [STEP] * recorded
    assert recorded >= 3


class TestRowsThatDoNotArrive:
    """A plugin that writes into a copy of the pool: the rows of a step are looked for before anything is answered."""

    @pytest.mark.parametrize("lost", [0, 3])
    def test_in_one_layer(self, package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
        written = GraphRunner._write_rows

        def write(self: GraphRunner, inputs: Any, *others: Any) -> None:
            inputs["slots"][lost] = -1
            written(self, inputs, *others)

        monkeypatch.setattr(GraphRunner, "_write_rows", write)
        with pytest.raises(EngineFailed, match=rf"layer {lost}'s new row is not in the pool: this TensorRT copies"):
            Runtime.load(package())

    def test_where_an_earlier_program_left_the_same_rows(
        self, package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = Runtime.load(package())._backend
        assert backend is not None
        backend.require_rows()  # type: ignore[attr-defined]
        monkeypatch.setattr(GraphRunner, "_write_rows", lambda *_: None)
        with pytest.raises(EngineFailed, match="layer 0's new row is not in the pool"):
            backend.require_rows()  # type: ignore[attr-defined]


def test_more_sequences_than_a_step_has_room_for(package: Callable[..., Path], checkpoint: Checkpoints) -> None:
    options = Options(method="full", max_new_tokens=6)
    expected = answers(Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float32)), options)
    for sequences, temperature in ((1, 0.0), (2, 0.0), (2, 0.7)):
        runtime = Runtime.load(package(recipe=Recipe(sequences=sequences, prune_after="never", pool_rows=8192)))
        found = answers(runtime, Options(method="full", max_new_tokens=6, temperature=temperature))
        assert all(len(each.token_ids) == 6 for each in found)
        if not temperature:
            assert [each.token_ids for each in found] == [each.token_ids for each in expected]


def test_pictures_are_encoded_as_many_at_a_time_as_fit(package: Callable[..., Path]) -> None:
    runtime = Runtime.load(package(recipe=Recipe(images=1, prune_after="never", pool_rows=8192)))
    assert runtime._backend is not None
    spec = runtime.spec.vision
    pixels = torch.randn(3, 3, spec.image_size, spec.image_size).numpy()
    together = runtime._backend.encode_images(pixels)
    alone = [runtime._backend.encode_images(pixels[at : at + 1]) for at in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


def test_a_budget_takes_what_engines_serve(package: Callable[..., Path]) -> None:
    """The measured table puts packed rows first: nobody asked for those."""
    runtime = Runtime.load(package())
    whole = runtime.prepare([random_image(1, 60)], PROMPT, Options(max_new_tokens=6)).plan.peak_bytes
    request = runtime.prepare([random_image(1, 60)], PROMPT, Options(kv_budget=whole * 9 // 10, max_new_tokens=6))
    assert request.plan.formats == Formats()
    assert request.plan.peak_bytes <= whole * 9 // 10
    assert len(runtime.submit(request).result().token_ids) == 6


def test_a_budget_for_given_formats_takes_methods_that_engines_serve(package: Callable[..., Path]) -> None:
    """Only the formats were asked for: a method that prunes elsewhere, or picks within a step, is passed over."""
    runtime = Runtime.open(package("qwen2-tied", dtype=torch.float16))
    images = [random_image(1, 60)]
    whole = runtime.prepare(images, PROMPT, Options(max_new_tokens=6)).plan.peak_bytes
    planned = 0
    for formats in (Formats(), Formats("int8", "int8", "int8"), Formats("int4", "int4", "int4")):
        for tenths in range(9, 0, -1):
            options = Options(kv_budget=whole * tenths // 10, formats=formats, max_new_tokens=6)
            with suppress(DoesNotFit):
                plan = runtime.prepare(images, PROMPT, options).plan
                assert plan.formats == formats
                assert plan.peak_bytes <= whole * tenths // 10
                planned += 1
    assert planned > 10
    for budget in (None, whole // 2, 1):
        with pytest.raises(BadInput, match="reads exact, int8, int4 rows, not lowrank:8"):
            runtime.prepare(images, PROMPT, Options(kv_budget=budget, formats=Formats("exact", "lowrank:8", "int8")))


REFUSED = {
    "low-rank rows": (
        Options(method="attentionpack", formats=Formats("exact", "lowrank:8", "lowrank:8")),
        "this package's engine, of float32, reads exact rows, not lowrank:8: give other formats",
    ),
    "packed rows in float32": (
        Options(method="full", formats=Formats("exact", "int8", "int4")),
        "this package's engine, of float32, reads exact rows, not int4, int8: "
        "give other formats, or give the checkpoint, with --device cuda",
    ),
    "another layer": (Options(method="avl"), r"avl prunes after layer 2, .* it prunes after layer 1, by the last"),
    "another rank": (
        Options(method="avl", parameters={"prune_layer": 1, "prefill_keep": 60, "prompt_mean": 1}),
        "avl prunes after layer 1, by what the package cannot",
    ),
    "a choice within a step": (Options(method="coarse"), "coarse picks rows within a step, which an engine cannot"),
    "a reserve": (None, "no part of a GPU's rows can be handed back"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_engines_do_not_serve_is_refused_before_anything_is_loaded(
    package: Callable[..., Path], what: str
) -> None:
    options, message = REFUSED[what]
    runtime = Runtime.open(package("qwen2-tied"))
    with pytest.raises(BadInput, match=message):
        runtime.prepare([random_image(1, 60)], PROMPT, options) if options else runtime.keep_free(10)
    with pytest.raises(BadInput, match="no scenes: ask one question at a time, or give the checkpoint"):
        runtime.look([random_image(1, 60)])


def test_sizes_that_the_package_was_not_built_for(package: Callable[..., Path]) -> None:
    out = package(recipe=Recipe(images=1, prompt_tokens=60, prune_after="never", pool_rows=160))
    runtime = Runtime.open(out)
    for images, prompt in (([random_image(1, 60)] * 2, "hi"), ([], "word " * 70)):
        with pytest.raises(BadInput, match="the package was built for 60 and 1 images: ask for less"):
            runtime.prepare(images, prompt)
    with pytest.raises(DoesNotFit, match="has 320 rows, but the model was built for 160"):
        runtime.load_weights(pool_bytes=320 * runtime.kv_shape.row_bytes)
    runtime.load_weights()
    assert runtime._pool.pages == 10


class TestOpen:
    def test_the_package_is_enough(self, package: Callable[..., Path], checkpoint: Checkpoints, tmp_path: Path) -> None:
        """Nothing of the checkpoint is read any more: the tokenizer and the templates came along."""
        out = package()
        expected = answers(Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float32)), METHODS["full"])
        (moved := tmp_path / "elsewhere").mkdir()
        moved = out.rename(moved / "model")
        assert [each.token_ids for each in answers(Runtime.load(moved), METHODS["full"])] == [
            each.token_ids for each in expected
        ]
        assert Runtime.open(moved).name == "model"

    def test_device(self, package: Callable[..., Path], checkpoint: Checkpoints) -> None:
        out = package()
        assert Runtime.open(out, device="tensorrt").name == out.name
        with pytest.raises(BadInput, match="is a package, whose engines run with --device tensorrt: for cpu give"):
            Runtime.open(out, device="cpu")
        whole = checkpoint("llama-gqa-full")
        with pytest.raises(BadInput, match=f"is no package: build one with avl-edge build {whole} --out PACKAGE"):
            Runtime.open(whole, device="tensorrt")
        with pytest.raises(BadInput, match="no device '': choose one of cpu, cuda, tensorrt"):
            Runtime.open(whole, device="")
        with pytest.raises(BadInput, match="no device 'tpu': choose one of cpu, cuda, tensorrt"):
            Runtime.open(out, device="tpu")

    def test_without_its_manifest(self, package: Callable[..., Path]) -> None:
        """It is still no checkpoint, of which it would be said what it lacks."""
        out = package()
        (out / "manifest.json").unlink()
        with pytest.raises(BadPackage, match="holds no package: build one with avl-edge build MODEL --out"):
            Runtime.open(out)

    def test_a_checkpoint_with_files_of_such_names_is_one(self, checkpoint: Checkpoints, tmp_path: Path) -> None:
        shutil.copytree(checkpoint("llama-gqa-full"), tmp_path / "model")
        for name in ("manifest.json", "lock"):
            (tmp_path / "model" / name).write_text("{}")
        assert Runtime.open(tmp_path / "model").name == "model"

    @pytest.mark.parametrize("command", [["profile"], ["plan"], ["eval", "--kl"], ["build", "--out", "other"]])
    def test_what_reads_weights_asks_for_the_checkpoint(
        self, package: Callable[..., Path], capsys: pytest.CaptureFixture[str], command: list[str]
    ) -> None:
        out = str(package())
        model = [out] if command[0] == "build" else ["--model", out]
        capsys.readouterr()
        assert run_app([*command, *model]) == 2
        error = capsys.readouterr().err
        assert error == f"avl-edge: {out} is a package of avl-edge build: give the checkpoint that it was built from\n"

    def test_of_other_kernels(self, package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        out = package()
        monkeypatch.setattr("avl_edge.places.tensorrt.digest", lambda: "f" * 64)
        with pytest.raises(Mismatch, match="was built for another attention kernel"):
            Runtime.open(out)

    @pytest.mark.parametrize("shapes", [{"images": 2, "cameras": 1}, {"images": 0}], ids=["a name", "a value"])
    def test_of_sizes_that_this_version_does_not_know(
        self, package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, shapes: dict[str, int]
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Recipe, "shapes", property(lambda _: shapes))
            patch.setattr(Recipe, "__post_init__", lambda _: None)
            out = package()
        with pytest.raises(BadPackage, match=r"was built by avl-edge 1\.0, for sizes unknown here: rebuild it"):
            Runtime.open(out)

    def test_of_another_form_of_the_graphs(self, package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        out = package()
        monkeypatch.setattr("avl_edge.export.decoder.names.SLOTS", "places")
        with pytest.raises(Mismatch, match="was built for another form of the ONNX graphs"):
            Runtime.open(out)

    def test_damaged(self, package: Callable[..., Path]) -> None:
        """Small files are looked at when it is opened, engines when they are loaded."""
        out = package()
        (built,) = out.glob("build-*")
        runtime = Runtime.open(out)
        (built / "decoder.engine").write_bytes(b"an enginf")
        with pytest.raises(BadPackage, match=r"decoder\.engine was changed after it was built"):
            runtime.load_weights()
        (built / "tokenizer.json").write_bytes(b"{}")
        with pytest.raises(BadPackage, match=r"tokenizer\.json has 2 bytes instead of"):
            Runtime.open(out)

    def test_built_anew_in_between(self, package: Callable[..., Path]) -> None:
        """Requests were checked against the sizes of the one that was opened."""
        runtime = Runtime.open(package())
        package(recipe=replace(RECIPE, prompt_tokens=100))
        with pytest.raises(BadInput, match="was built anew meanwhile: open it again"):
            runtime.load_weights()

    def test_graphs_alone(self, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("avl_edge.engine.job.find_tensorrt", lambda: None)
        build(Job.of(checkpoint("llama-gqa-full"), RECIPE), tmp_path / "out", "1.0")
        with pytest.raises(Mismatch, match=r"holds ONNX graphs but no engines: .* on the device"):
            Runtime.open(tmp_path / "out")


@pytest.mark.slow
def test_check_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/gpu's check of engines: the demo model, as ONNX Runtime takes it, against the CPU's bfloat16."""
    monkeypatch.setattr(engines, "decoder_plugin", lambda: None)
    with pytest.raises(Skipped, match="there is no tensorrt that takes plugins"):
        engines.check_engines()
    monkeypatch.setattr(engines, "decoder_plugin", lambda: Plugin(digest(), lambda _: None))
    assert engines.check_engines("float16")["answers"] == 12 + 2 * 3, "exact rows, and two formats of packed ones"
    monkeypatch.setattr(GraphRunner, "_write_rows", lambda *_: None)
    monkeypatch.setattr(EngineBackend, "require_rows", lambda _: None)
    with pytest.raises(CheckFailed, match="of 12 answers are not the CPU's"):
        engines.check_engines("float32")


def test_command(package: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`avl-edge run` on a package: the device follows from the model."""
    picture = tmp_path / "picture.png"
    random_image(1, 60).save(picture)
    out = package()
    arguments: list[Any] = ["run", "--model", out, "--image", picture, "--prompt", PROMPT, "--max-new-tokens", 4]
    assert run_app([str(each) for each in [*arguments, "--stats"]]) == 0
    assert "rows read" in capsys.readouterr().err
    assert run_app([str(each) for each in [*arguments, "--reserve", "1kB"]]) == 2
    assert "no part of a GPU's rows can be handed back" in capsys.readouterr().err
