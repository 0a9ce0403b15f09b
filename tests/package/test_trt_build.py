"""Engines built: what `build` gives TensorRT, which is played by a stand-in, and the profiles of the decoder's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avl_edge.backends.tensorrt import decoder_plugin
from avl_edge.backends.tensorrt.kernels import digest
from avl_edge.backends.tensorrt.plugin import PluginMissing
from avl_edge.cli.build import engines_built
from avl_edge.package.engine import (
    DECODER_ENGINE,
    TIMINGS,
    VISION_ENGINE,
    BadRecipe,
    Job,
    Plugin,
    Recipe,
    build,
    decoder_formats,
    decoder_profiles,
    open_package,
)
from avl_edge.package.export import PLUGIN_DECODER, VISION, decoder_bindings
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import SPECS

pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def spec(checkpoint: Checkpoints) -> Any:
    return Job.of(checkpoint("llama-bias"), Recipe()).spec


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

        monkeypatch.setattr("avl_edge.package.engine.job.build_engine", build_engine)
        monkeypatch.setattr("avl_edge.package.engine.job.find_tensorrt", lambda: "trt")
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
        assert manifest.fingerprint.platform is not None
        assert manifest.fingerprint.platform.kernel == "kernels"
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
            assert engines_built(manifest) == text
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

    def test_packed_rows_are_for_engines_of_16_bits(self, checkpoint: Checkpoints) -> None:
        """A part more for each format, and a pool of which both views are as large."""
        recipe, text = Recipe(sequences=4, pool_rows=640), SPECS["llama-mha"]
        spec = Job.of(checkpoint("llama-mha"), recipe).spec
        for precision, parts in (("float16", 4), ("bfloat16", 4), ("float32", 1)):
            assert len(decoder_formats(spec, precision)) == parts
            prompt, step = decoder_profiles(spec, recipe, precision)
            assert prompt["P * T"] == (1, prompt["T"][1], parts * prompt["T"][2])
            assert prompt["P * B + 1"] == (2, 2, parts + 1)
            assert prompt["N"] == (1, 1, spec.text.context), "of a question over a shared prefix"
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
