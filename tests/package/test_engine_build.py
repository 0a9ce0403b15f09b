"""`avl-edge build`: recipe and checkpoint to a package of graphs, and what it says on the way."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from avl_edge.cli import run_app
from avl_edge.errors import BadModel
from avl_edge.package.engine import (
    BadPackage,
    BadRecipe,
    BuildFailed,
    Job,
    Recipe,
    build,
    checkpoint_digest,
    find_recipe,
    open_package,
    read_recipe,
    shipped_recipes,
)
from avl_edge.package.export import DECODER, VISION
from tests import ROOT
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import SPECS, make_checkpoint

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

ENGINES = ROOT / "engines"


@pytest.fixture(autouse=True)
def _no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama-bias")


class TestRecipe:
    def test_shipped_recipes_can_be_read(self) -> None:
        assert sorted(shipped_recipes().values()) == sorted(ENGINES.iterdir())
        recipes = {name: find_recipe(name) for name in shipped_recipes()}
        assert recipes["llava-1.5"] == Recipe(precision="float16")

    def test_a_file_goes_before_a_name_and_a_folder_does_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine.yml").write_text("images: 1")
        assert find_recipe("mine.yml") == find_recipe(str(tmp_path / "mine.yml")) == Recipe(images=1)
        (tmp_path / "llava-1.5").mkdir()
        assert find_recipe("llava-1.5") == Recipe(precision="float16")
        (tmp_path / "llava-1.5").rmdir()
        (tmp_path / "llava-1.5").write_text("images: 2")
        assert find_recipe("llava-1.5") == Recipe(images=2)

    @pytest.mark.parametrize("name", ["llava", "none.yaml", "engines/llava-1.5", "", ".", "x" * 5000, "a\0b"])
    def test_an_unknown_name_is_told_the_known_ones(self, name: str) -> None:
        with pytest.raises(BadRecipe) as error:
            find_recipe(name)
        said, advice = str(error.value), ": give one of llava-1.5, or a recipe's file"
        if len(name) <= 50:
            assert said == f"there is no recipe {name!r}{advice}"
        else:
            assert said.startswith("there is no recipe 'xxx")
            assert said.endswith(f"xxx'{advice}")
            assert len(said) < 150

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("precison: float16", "'precison', which is not known: use precision, "),
            ("precision: int3", "precision 'int3' must be one of stored, float32, float16, bfloat16"),
            ("images: 0", "images 0 must be a whole number"),
            ("sequences: true", "sequences True must be a whole number"),
            ("prune_after: always", "prune_after 'always' must be a layer, or never"),
            ("pool_rows: 15", "pool_rows 15 must be at least 16, one page's"),
            ("prompt_tokens: 4096", "prompt_tokens 4096 must be at most 3840, or prune_after never"),
            ("- images", "must hold names with values"),
            ("workspace: much", "workspace: cannot read 'much' as a size"),
            ("workspace: 0", "workspace: it must be more than nothing"),
            ("images: [", "is not valid YAML"),
            ("images: 2020-13-45", "is not valid YAML"),
            ("images: 1\nimages: 2", "a key stands twice"),
            ("[" * 3000, "is not valid YAML"),
        ],
    )
    def test_errors_name_file_and_key(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(BadRecipe) as error:
            read_recipe(path)
        assert message in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(BadRecipe, match="No such file"):
            read_recipe(tmp_path / "none.yaml")


class TestJob:
    def test_takes_what_the_checkpoint_is(self, model: Path) -> None:
        job = Job.of(model, Recipe())
        assert job.settings.precision == "float32"
        assert job.settings.prune_after == 2
        assert job.recipe.prompt_tokens == SPECS["llama-bias"].max_position_embeddings

    @pytest.mark.parametrize("prune_after", ["never", SPECS["llama-bias"].layers - 1, 40])
    def test_no_pruning_beyond_the_last_layer(self, model: Path, prune_after: int) -> None:
        assert Job.of(model, Recipe(prune_after=prune_after)).settings.prune_after is None

    def test_sizes_of_a_known_model(self, tmp_path: Path) -> None:
        """LLaVA-1.5-7B in float16, against the published parameter counts: 6.74e9 + 64 rows, and 0.29e9 + 0.02e9."""
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision |= {"image_size": 336, "patch_size": 14, "model_type": "clip_vision_model"}
        text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
        config = {"model_type": "llava", "vision_config": vision, "text_config": text}
        (tmp_path / "config.json").write_text(json.dumps(config))
        job = Job.of(tmp_path, Recipe(precision="float16"))
        assert job.plan.weights[DECODER] / 2 == pytest.approx(6.739e9, rel=1e-3)
        assert job.plan.weights[VISION] / 2 == pytest.approx(0.291e9 + 0.021e9, rel=0.01)
        assert job.run_memory - job.plan.bytes == 3072 * 524_288

    def test_stored_in_a_dtype_without_engines(self, tmp_path: Path) -> None:
        directory = make_checkpoint(tmp_path, SPECS["llama-mha"])
        from safetensors.torch import load_file, save_file

        path = directory / "model.safetensors"
        save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)
        with pytest.raises(BadModel, match="stored as float64: build with --precision float32"):
            Job.of(directory, Recipe())
        assert Job.of(directory, Recipe(precision="float32")).settings.precision == "float32"


class TestCheckpointDigest:
    def test_follows_config_and_weights_and_nothing_else(self, tmp_path: Path) -> None:
        directory = make_checkpoint(tmp_path, SPECS["llama-mha"])
        first = checkpoint_digest(directory)
        (directory / "README.md").write_text("a checkpoint")
        assert checkpoint_digest(directory) == first
        weights = directory / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        second = checkpoint_digest(directory)
        (directory / "config.json").write_text((directory / "config.json").read_text() + " ")
        assert len({first, second, checkpoint_digest(directory)}) == 3

    def test_without_config(self, tmp_path: Path) -> None:
        with pytest.raises(BadModel, match=r"config\.json cannot be read"):
            checkpoint_digest(tmp_path)


class TestBuild:
    def test_built_once(self, model: Path, tmp_path: Path) -> None:
        job, out = Job.of(model, Recipe()), tmp_path / "out"
        manifest, built = build(job, out, "1.0")
        assert built
        assert build(job, out, "1.0") == (manifest, False)
        with open_package(out, job.fingerprint()) as package:
            session = onnxruntime.InferenceSession(str(package[VISION]), providers=["CPUExecutionProvider"])
            pixels = np.zeros((1, 3, job.spec.vision.image_size, job.spec.vision.image_size), dtype=np.float32)
            assert session.run(None, {"pixels": pixels})[0].shape[1:] == (16, job.spec.text.hidden_size)

    @pytest.mark.parametrize("change", [{"precision": "float16"}, {"images": 9}, {"prune_after": 1}])
    def test_built_anew_when_the_recipe_changes(self, model: Path, tmp_path: Path, change: dict[str, object]) -> None:
        out = tmp_path / "out"
        build(Job.of(model, Recipe()), out, "1.0")
        job = Job.of(model, Recipe(**change))  # type: ignore[arg-type]
        assert build(job, out, "1.0")[1]
        with open_package(out, job.fingerprint()):
            pass

    def test_built_anew_when_damaged(self, model: Path, tmp_path: Path) -> None:
        job, out = Job.of(model, Recipe()), tmp_path / "out"
        build(job, out, "1.0")
        next(out.glob("build-*/decoder.onnx")).write_bytes(b"")
        with pytest.raises(BadPackage):
            open_package(out)
        assert build(job, out, "1.0")[1]
        with open_package(out):
            pass

    def test_disk_that_is_too_small_is_refused_before_the_work(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
        with pytest.raises(BuildFailed, match=r"needs 1\.\d MB, and 1\.0 MB are free: free some space"):
            build(Job.of(model, Recipe()), tmp_path / "out", "1.0")
        assert not (tmp_path / "out").exists()

    def test_folder_that_cannot_be_entered(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Python tells of such a folder by an error rather than by False."""

        def refuse(path: Path, **_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        job = Job.of(model, Recipe())
        monkeypatch.setattr("avl_edge.package.engine.job.shutil.disk_usage", refuse)
        with pytest.raises(BuildFailed, match=r"cannot be reached \(Permission denied\): give another --out"):
            build(job, tmp_path / "out", "1.0")
        monkeypatch.setattr(Path, "stat", refuse)
        with pytest.raises(BadModel, match="there is no model"):
            Job.of(tmp_path / "secret" / "model", Recipe())


# The kernel refuses to let a file grow beyond a limit: a real write that fails in the middle.
LIMITED = """
    import resource, signal, sys
    from avl_edge.cli import main
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    sys.argv[1:] = ["build", *sys.argv[1:]]
    main()
"""


class TestCommand:
    def test_build(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        assert run_app(["build", str(model), "--out", str(out), "--precision", "float16"]) == 0
        captured = capsys.readouterr()
        assert (Path(captured.out.strip()) / DECODER).is_file()
        assert captured.err.count("\n") == 1
        assert "need TensorRT on the device" in captured.err
        assert run_app(["build", str(model), "--out", str(out), "--precision", "float16", "--json"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["fingerprint"]["precision"] == "float16"
        assert "already holds" in captured.err

    def test_dry_run_writes_nothing(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        assert run_app(["build", str(model), "--out", str(out), "--dry-run", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["disk_bytes"] == sum(plan["weights_bytes"].values())
        assert plan["engine_memory_bytes"] > plan["export_memory_bytes"]
        assert run_app(["build", str(model), "--out", str(out), "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert "would build" in text
        assert "memory" in text
        assert not out.exists()

    def test_recipe_by_name(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["build", str(model), "--out", str(tmp_path / "out"), "--dry-run", "--recipe"]
        assert run_app([*command, "llava-1.5"]) == 0
        assert f"from {model}: float16, pruning after layer 2" in capsys.readouterr().out
        assert run_app([*command, "llava-1.6"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == "avl-edge: there is no recipe 'llava-1.6': give one of llava-1.5, or a recipe's file\n"

    def test_file_that_cannot_grow(self, model: Path, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(LIMITED), str(model), "--out", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1
        assert "cannot be written (a file is too large), what was there before is untouched" in done.stderr
        assert done.stderr.count("\n") == 1
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]

    def test_without_onnx(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        assert run_app(["build", str(model), "--out", str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert "pip install 'avl-edge[export]'" in captured.err
        assert captured.err.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_bad_arguments(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_app(["build", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
        assert "there is no model" in capsys.readouterr().err
        assert run_app(["build", "demo", "--out", str(tmp_path / "out"), "--precision", "int3"]) == 2
        assert "precision 'int3' must be one of" in capsys.readouterr().err
