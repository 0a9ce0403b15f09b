"""A package as a target: what opens, what is served there, and what a refusal says. Nothing is computed but by ONNX
Runtime, in the engines' place."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from avl_edge import BadInput, DoesNotFit, Formats, Options, Runtime
from avl_edge.cli import run_app
from avl_edge.kv.methods import Full
from avl_edge.kv.quality import Point, table
from avl_edge.package.engine import BadPackage, Job, Mismatch, Recipe, build
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from tests.equipment.engines_on_cpu import PROMPT, RECIPE, Packages, answers, stand_in

FULL = Options(method="full")


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture
def package(checkpoint: Checkpoints, tmp_path: Path) -> Packages:
    return Packages(checkpoint, tmp_path)


def test_a_budget_takes_what_engines_serve(package: Packages) -> None:
    """The measured table puts packed rows first: nobody asked for those."""
    runtime = Runtime.load(package(), threaded=False)
    whole = runtime.prepare([random_image(1, 60)], PROMPT, Options(max_new_tokens=6)).plan.peak_bytes
    request = runtime.prepare([random_image(1, 60)], PROMPT, Options(kv_budget=whole * 9 // 10, max_new_tokens=6))
    assert request.plan.formats == Formats()
    assert request.plan.peak_bytes <= whole * 9 // 10
    assert len(runtime.submit(request).result().token_ids) == 6


def test_a_budget_for_given_formats_takes_methods_that_engines_serve(package: Packages) -> None:
    """Only the formats were asked for: a method that prunes elsewhere, or picks within a step, is passed over."""
    runtime = Runtime.open(package("qwen2-tied", dtype=torch.float16), threaded=False)
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
        with pytest.raises(BadInput, match="reads exact, int8, int4, int8/int4 rows, not lowrank:8"):
            runtime.prepare(images, PROMPT, Options(kv_budget=budget, formats=Formats("exact", "lowrank:8", "int8")))


@pytest.mark.parametrize(("dtype", "formats"), [(torch.float16, "int8/int4"), (torch.float32, "exact")])
def test_lossless_is_what_engines_serve(package: Packages, dtype: torch.dtype, formats: str) -> None:
    """Of small rows in float32 none is smaller in a format that holds: exact ones stand in for it."""
    runtime, options = Runtime.open(package("qwen2-tied", dtype=dtype), threaded=False), Options(preset="lossless")
    request = runtime.prepare([random_image(1, 60)], PROMPT, options)
    asked = runtime.open_images([random_image(1, 60)], options).prepare(PROMPT)
    for plan in (request.plan, *asked.plans):
        assert (plan.method, set(plan.formats.by_tier().values())) == (Full(), {formats})


@pytest.mark.parametrize(("prune_after", "setting"), [(1, "distinct"), (2, "avl")])
def test_small_is_what_engines_serve(
    package: Packages, tmp_path: Path, capsys: pytest.CaptureFixture[str], prune_after: int, setting: str
) -> None:
    """Over exact rows A-VL by the whole question's attention is measured best, but no package prunes by that; one that
    prunes elsewhere serves no A-VL from an eighth. What is explained is the setting that was taken."""
    many = replace(RECIPE, prune_after=prune_after, images=12, prompt_tokens=1000)
    best = max((each for each in table().points if each.setting == setting and each.stored <= 0.13), key=_score)
    picture = tmp_path / "picture.png"
    random_image(1, 60).save(picture)
    arguments: list[Any] = ["run", "--model", package("llama3-rope", many), "--prompt", "Go", "--max-new-tokens", 1]
    arguments += [*["--image", picture] * many.images, "--preset", "small", "--explain"]
    assert run_app([str(each) for each in arguments]) == 0
    explained = capsys.readouterr().err
    assert (
        f"small: {setting.partition(':')[0]} ({'secondary' if setting == 'distinct' else 'prefill_keep'}=" in explained
    )
    assert f"{100 * best.score:.1f} % right answers" in explained


def _score(point: Point) -> float:
    return point.score


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
def test_what_engines_do_not_serve_is_refused_before_anything_is_loaded(package: Packages, what: str) -> None:
    options, message = REFUSED[what]
    runtime = Runtime.open(package("qwen2-tied"), threaded=False)
    with pytest.raises(BadInput, match=message):
        runtime.prepare([random_image(1, 60)], PROMPT, options) if options else runtime.keep_free(10)


def test_sizes_that_the_package_was_not_built_for(package: Packages) -> None:
    out = package(recipe=Recipe(images=1, prompt_tokens=60, prune_after="never", pool_rows=160))
    runtime = Runtime.open(out, threaded=False)
    for images, prompt in (([random_image(1, 60)] * 2, "hi"), ([], "word " * 70)):
        with pytest.raises(BadInput, match="the package was built for 60 and 1 images: ask for less"):
            runtime.prepare(images, prompt)
    with pytest.raises(DoesNotFit, match="has 320 rows, but the model was built for 160"):
        runtime.load_weights(pool_bytes=320 * runtime.kv_shape.row_bytes)
    runtime.load_weights()
    assert runtime.debug.pool.pages == 10


class TestOpen:
    def test_the_package_is_enough(self, package: Packages, checkpoint: Checkpoints, tmp_path: Path) -> None:
        """Nothing of the checkpoint is read any more: the tokenizer and the templates came along."""
        out = package()
        expected = answers(Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float32), threaded=False), FULL)
        (moved := tmp_path / "elsewhere").mkdir()
        moved = out.rename(moved / "model")
        assert [each.token_ids for each in answers(Runtime.load(moved, threaded=False), FULL)] == [
            each.token_ids for each in expected
        ]
        assert Runtime.open(moved, threaded=False).name == "model"

    def test_device(self, package: Packages, checkpoint: Checkpoints) -> None:
        out = package()
        assert Runtime.open(out, device="tensorrt", threaded=False).name == out.name
        with pytest.raises(BadInput, match="is a package, whose engines run with --device tensorrt: for cpu give"):
            Runtime.open(out, device="cpu", threaded=False)
        whole = checkpoint("llama-gqa-full")
        with pytest.raises(BadInput, match=f"is no package: build one with avl-edge build {whole} --out PACKAGE"):
            Runtime.open(whole, device="tensorrt", threaded=False)
        with pytest.raises(BadInput, match="no device '': choose one of cpu, cuda, tensorrt"):
            Runtime.open(whole, device="", threaded=False)
        with pytest.raises(BadInput, match="no device 'tpu': choose one of cpu, cuda, tensorrt"):
            Runtime.open(out, device="tpu", threaded=False)

    def test_without_its_manifest(self, package: Packages) -> None:
        """It is still no checkpoint, of which it would be said what it lacks."""
        out = package()
        (out / "manifest.json").unlink()
        with pytest.raises(BadPackage, match="holds no package: build one with avl-edge build MODEL --out"):
            Runtime.open(out, threaded=False)

    def test_a_checkpoint_with_files_of_such_names_is_one(self, checkpoint: Checkpoints, tmp_path: Path) -> None:
        shutil.copytree(checkpoint("llama-gqa-full"), tmp_path / "model")
        for name in ("manifest.json", "lock"):
            (tmp_path / "model" / name).write_text("{}")
        assert Runtime.open(tmp_path / "model", threaded=False).name == "model"

    @pytest.mark.parametrize("command", [["profile"], ["plan"], ["eval", "--kl"], ["build", "--out", "other"]])
    def test_what_reads_weights_asks_for_the_checkpoint(
        self, package: Packages, capsys: pytest.CaptureFixture[str], command: list[str]
    ) -> None:
        out = str(package())
        model = [out] if command[0] == "build" else ["--model", out]
        capsys.readouterr()
        assert run_app([*command, *model]) == 2
        error = capsys.readouterr().err
        assert error == f"avl-edge: {out} is a package of avl-edge build: give the checkpoint that it was built from\n"

    def test_of_other_kernels(self, package: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
        out = package()
        monkeypatch.setattr("avl_edge.backends.tensorrt.target.digest", lambda: "f" * 64)
        with pytest.raises(Mismatch, match="was built for another attention kernel"):
            Runtime.open(out, threaded=False)

    @pytest.mark.parametrize("shapes", [{"images": 2, "cameras": 1}, {"images": 0}], ids=["a name", "a value"])
    def test_of_sizes_that_this_version_does_not_know(
        self, package: Packages, monkeypatch: pytest.MonkeyPatch, shapes: dict[str, int]
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Recipe, "shapes", property(lambda _: shapes))
            patch.setattr(Recipe, "__post_init__", lambda _: None)
            out = package()
        with pytest.raises(BadPackage, match=r"was built by avl-edge 1\.0, for sizes unknown here: rebuild it"):
            Runtime.open(out, threaded=False)

    def test_of_another_form_of_the_graphs(self, package: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
        out = package()
        monkeypatch.setattr("avl_edge.package.export.decoder.names.SLOTS", "places")
        with pytest.raises(Mismatch, match="was built for another form of the ONNX graphs"):
            Runtime.open(out, threaded=False)

    def test_damaged(self, package: Packages) -> None:
        """Small files are verified when it is opened, engines when they are loaded."""
        out = package()
        (built,) = out.glob("build-*")
        runtime = Runtime.open(out, threaded=False)
        (built / "decoder.engine").write_bytes(b"an enginf")
        with pytest.raises(BadPackage, match=r"decoder\.engine was changed after it was built"):
            runtime.load_weights()
        (built / "tokenizer.json").write_bytes(b"{}")
        with pytest.raises(BadPackage, match=r"tokenizer\.json has 2 bytes instead of"):
            Runtime.open(out, threaded=False)

    def test_built_anew_in_between(self, package: Packages) -> None:
        """Requests were checked against the sizes of the one that was opened."""
        runtime = Runtime.open(package(), threaded=False)
        package(recipe=replace(RECIPE, prompt_tokens=100))
        with pytest.raises(BadInput, match="was built anew meanwhile: open it again"):
            runtime.load_weights()

    def test_graphs_alone(self, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("avl_edge.package.engine.job.find_tensorrt", lambda: None)
        build(Job.of(checkpoint("llama-gqa-full"), RECIPE), tmp_path / "out", "1.0")
        with pytest.raises(Mismatch, match=r"holds ONNX graphs but no engines: .* on the device"):
            Runtime.open(tmp_path / "out", threaded=False)


def test_command(package: Packages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`avl-edge run` on a package: the device follows from the model."""
    picture = tmp_path / "picture.png"
    random_image(1, 60).save(picture)
    out = package()
    arguments: list[Any] = ["run", "--model", out, "--image", picture, "--prompt", PROMPT, "--max-new-tokens", 4]
    assert run_app([str(each) for each in [*arguments, "--stats"]]) == 0
    assert "rows read" in capsys.readouterr().err
    assert run_app([str(each) for each in [*arguments, "--preset", "lossless", "--explain"]]) == 0
    assert "lossless: full (rows exact): the fewest bytes within 0.5 points" in capsys.readouterr().err
    assert run_app([str(each) for each in [*arguments, "--reserve", "1kB"]]) == 2
    assert "no part of a GPU's rows can be handed back" in capsys.readouterr().err
