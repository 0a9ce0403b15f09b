"""Shared prefixes on engines: a picture's rows, left by `prefill_prefix`, and the questions that read them, by the
exported graphs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avl_edge import BadInput, DoesNotFit, Formats, Options, Result, Runtime
from avl_edge.attention.cuda import FORMATS
from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.cli import run_app
from avl_edge.kv.methods import Avl, Distinct, Full, Method
from avl_edge.kv.shared_prefix import QuestionCache
from avl_edge.kv.store import RowStore
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.package.engine import PROMPT, Mismatch
from avl_edge.package.export import bindings as names
from avl_edge.package.export.bindings import Binding
from avl_edge.request import Prompt
from tests.conftest import Checkpoints
from tests.equipment.cuda_sides import STEP_OF, PrefixSide, Side, close, prefixes, run_both
from tests.equipment.image_sessions import AVL, FIRST, FULL, IMAGES, PROMPT_MEAN, SECOND, is_empty

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from tests.equipment.engines_on_cpu import RECIPE, GraphRunner, Packages, stand_in
from tests.equipment.prompts_first import STEPPED

ROWS = {
    "exact": Formats(),
    "int8": Formats("int8", "int8", "int8"),
    "image int4": Formats("exact", "int4", "int4"),
    "text int4": Formats("int4", "exact", "exact"),
    "packed both": Formats("int4", "int8", "int8"),
}
QUESTIONS: dict[str, Method] = {
    "full": Full(),
    "avl": Avl(secondary=100, prefill_keep=100, core=30, refresh=3, text_keep=60, text_floor=4),
    "avl-mean": Avl(secondary=100, prefill_keep=100, core=20, prompt_mean=1, refresh=2),
}
PART: dict[str, Method] = {
    "distinct": Distinct(60),
    "avl": Avl(secondary=60, prefill_keep=100, by_values=1, core=30, prompt_mean=1, refresh=2),
}
OPTIONS = {
    "full": FULL,
    "avl": AVL,
    "prompt_mean": PROMPT_MEAN,
    "distinct": Options(method="distinct", parameters={"secondary": 40}, max_new_tokens=24),
    "by values": Options(
        method="avl",
        parameters={"secondary": 60, "prefill_keep": 100, "by_values": 1, "core": 20, "text_floor": 4},
        max_new_tokens=24,
    ),
}


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def package(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Packages:
    return Packages(checkpoint, tmp_path_factory.mktemp("packages"))


@pytest.fixture
def every_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs in float32, whose packed rows no kernel of a GPU reads: to compare tokens."""
    monkeypatch.setattr("avl_edge.backends.tensorrt.target.decoder_formats", lambda *_: tuple(FORMATS))


class Pairs:
    """``pairs(name, images, method, formats)``: the torch backend and the engines', which have prefilled the same
    pictures, the engines' decoder, and the prompts of three questions."""

    def __init__(self, package: Packages, checkpoint: Checkpoints) -> None:
        self._package, self._checkpoint = package, checkpoint

    def __call__(
        self, name: str, images: int, method: Method, formats: Formats, dtype: torch.dtype = torch.float32
    ) -> tuple[PrefixSide, PrefixSide, GraphRunner, list[Prompt]]:
        runtime, directory = (
            Runtime.load(self._package(name, dtype=dtype), **STEPPED),
            self._checkpoint(name, dtype=dtype),
        )
        backend: Any = runtime.debug.backend
        spec, pages = read_spec(directory), runtime.debug.pool.pages
        model = VisionLanguageModel(spec, load_weights(directory))
        oracle = TorchBackend(model, RowStore(pages, runtime.kv_shape, dtype))
        sides = [Side(each, spec, dtype.itemsize, pages) for each in (oracle, backend)]
        decoder = backend.engines.decoder
        del decoder.runs[:]
        (theirs, ours), prompts = prefixes(sides, images, method, formats)
        return theirs, ours, decoder, prompts


@pytest.fixture
def pairs(package: Packages, checkpoint: Checkpoints) -> Pairs:
    return Pairs(package, checkpoint)


@pytest.mark.usefixtures("every_format")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", QUESTIONS)
@pytest.mark.parametrize(("name", "images"), [("llama-gqa-full", 2), ("qwen2-gqa", 1)])
def test_questions_equal_the_oracles(pairs: Pairs, name: str, images: int, method: str, rows: str) -> None:
    """Logits, rows, tiers and counts of three questions that join one after another: of many tokens, of one."""
    formats = ROWS[rows]
    oracle, ours, decoder, prompts = pairs(name, images, Full(), formats)
    for got, expected in zip(ours.shared.totals, oracle.shared.totals, strict=True):
        assert np.abs(got - expected).max() <= 1e-5
        assert (images > 1) == bool(expected.any()), "of text between two pictures"
    run_both(oracle, ours, [(prompt, QUESTIONS[method], formats) for prompt in prompts], STEP_OF[formats.text])
    asked = [dims for profile, dims in decoder.runs if profile == PROMPT]
    parts = 1 + max(list(FORMATS).index(each) for each in formats.by_tier().values())
    assert [(dims["T"], dims["N"]) for dims in asked] == [
        (len(ours.head), 1),
        *((len(prompt) - len(ours.head), len(ours.head)) for prompt in prompts),
    ]
    assert [dims["P * B + 1"] - 1 for dims in asked] == [1, *[parts] * len(prompts)]


@pytest.mark.usefixtures("every_format")
@pytest.mark.parametrize("rows", ["exact", "image int4"])
@pytest.mark.parametrize("method", PART)
def test_a_shared_prefix_of_what_stands_out_equals_the_oracles(pairs: Pairs, method: str, rows: str) -> None:
    """Each layer lists rows of its own, and a question's values are measured beside the prefix's."""
    formats = ROWS[rows]
    oracle, ours, _, prompts = pairs("llama-gqa-full", 2, Distinct(60), formats)
    for got, expected in zip(ours.shared.rows, oracle.shared.rows, strict=True):
        assert got.image_positions.tolist() == expected.image_positions.tolist()
    run_both(oracle, ours, [(prompt, PART[method], formats) for prompt in prompts], STEP_OF[formats.text])


@pytest.mark.usefixtures("every_format")
@pytest.mark.parametrize("rows", ["exact", "packed both"])
def test_policies_are_given_what_the_oracle_gives_them(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    """Scores and distances of the prefix's rows, as they are read back, and of the question's tokens behind them. The
    rows are the oracle's on both sides, so that none was rounded otherwise."""
    oracle, ours, _, prompts = pairs("llama-gqa-full", 2, Distinct(60), ROWS[rows])
    theirs, own = oracle.backend.rows.store, ours.backend.rows.store
    own.key_bytes.copy_(theirs.key_bytes)
    own.value_bytes.copy_(theirs.value_bytes)
    given: list[tuple[Any, ...]] = []
    store = QuestionCache.store_prompt

    def record(self: QuestionCache, *view: Any) -> Any:
        given.append(view)
        return store(self, *view)

    monkeypatch.setattr(QuestionCache, "store_prompt", record)
    for side in (oracle, ours):
        side.start(prompts[0], PART["avl"], ROWS[rows])
    layers = ours.spec.text.layers
    for (layer, *expected), (_, *got) in zip(given[:layers], given[layers:], strict=True):
        assert len(got) == len(expected) == 3
        for exact, found in zip(expected, got, strict=True):
            assert len(found) == len(ours.shared.stored(layer)) + len(prompts[0]) - len(ours.head)
            np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-5)
            assert found.std() > 0


@pytest.mark.parametrize("rows", ["exact", "image int4"])
def test_half_precision_is_as_close_as_its_rounding(pairs: Pairs, rows: str) -> None:
    """As engines serve packed rows; logits of questions, and of a step after each, which come in float32."""
    formats, dtype = ROWS[rows], torch.float16
    oracle, ours, _, prompts = pairs("llama-gqa-full", 2, Full(), formats, dtype)
    limit = 8 * torch.finfo(dtype).eps + (0 if rows == "exact" else STEP_OF["int4"])
    for prompt in prompts:
        (theirs, expected), (own, got) = (side.start(prompt, Full(), formats) for side in (oracle, ours))
        token = int(expected.argmax())
        close(got, expected.float(), limit)
        step, expected = ours.backend.decode([token], [own]).logits, oracle.backend.decode([token], [theirs]).logits
        close(step, expected.float(), limit)


def answers(runtime: Runtime, options: Options) -> list[Result]:
    """Two questions at once, with a plain request between, and one after them."""
    with runtime.open_images(IMAGES, options) as session:
        running = [session.ask(FIRST), runtime.generate(IMAGES[:1], FIRST, FULL), session.ask(SECOND)]
        found = [each.result() for each in running]
        found.append(session.ask(SECOND).result())
    assert is_empty(runtime)
    return found


@pytest.mark.parametrize("name", ["mistral-gqa", "qwen2-tied"])
@pytest.mark.parametrize("options", OPTIONS)
def test_answers_are_those_of_the_cpu(package: Packages, checkpoint: Checkpoints, name: str, options: str) -> None:
    """Token by token, with as many rows stored and read and as many refreshes."""
    expected = answers(Runtime.load(checkpoint(name, dtype=torch.float32), **STEPPED), OPTIONS[options])
    found = answers(Runtime.load(package(name), **STEPPED), OPTIONS[options])
    assert {each.backend for each in found} == {"tensorrt"}
    assert [(each.token_ids, each.kv) for each in found] == [(each.token_ids, each.kv) for each in expected]


@pytest.mark.usefixtures("every_format")
@pytest.mark.parametrize("options", ["full", "avl", "distinct"])
@pytest.mark.parametrize("rows", ["int8", "image int4"])
def test_answers_over_packed_rows_are_those_of_the_cpu(
    package: Packages, checkpoint: Checkpoints, rows: str, options: str
) -> None:
    """Where the last bit of two programs decides to which number a row is rounded, an answer may go its own way: one of
    four, and not at its beginning (see test_trt_backend)."""
    asked = replace(OPTIONS[options], formats=ROWS[rows])
    expected = answers(Runtime.load(checkpoint("mistral-gqa", dtype=torch.float32), **STEPPED), asked)
    found = answers(Runtime.load(package("mistral-gqa"), **STEPPED), asked)
    assert [each.token_ids[:8] for each in found] == [each.token_ids[:8] for each in expected]
    assert sum(ours.token_ids == oracle.token_ids for ours, oracle in zip(found, expected, strict=True)) >= 3
    assert [each.kv for each in found] == [each.kv for each in expected]


def test_a_question_brings_its_own_tokens_alone(package: Packages, checkpoint: Checkpoints) -> None:
    """Together with its prefix it may be longer than the prompts that the package was built for."""
    whole = Runtime.open(checkpoint("mistral-gqa"), **STEPPED)
    shared, asked = whole.open_images(IMAGES).stats.tokens, len(whole.prepare(IMAGES, SECOND).prompt)
    runtime = Runtime.load(package("mistral-gqa", replace(RECIPE, prompt_tokens=shared)), **STEPPED)
    assert shared < asked
    with pytest.raises(BadInput, match=f"the prompt takes {asked} tokens, .* built for {shared} and 2 images"):
        runtime.generate(IMAGES, SECOND, FULL)
    expected = (
        Runtime.load(checkpoint("mistral-gqa", dtype=torch.float32), **STEPPED).generate(IMAGES, SECOND, FULL).result()
    )
    with runtime.open_images(IMAGES, FULL) as session:
        assert session.ask(SECOND).result().token_ids == expected.token_ids


def test_a_shared_prefix_is_there_when_it_returns(package: Packages) -> None:
    runtime: Any = Runtime.load(package("mistral-gqa"), **STEPPED)
    log = runtime.debug.backend.accelerator.log
    log.clear()
    with runtime.open_images(IMAGES, FULL) as session:
        assert session.load().bytes_stored > 0
    assert log == ["synchronize"]


class TestRefused:
    """Before anything is loaded, in one line."""

    @pytest.fixture
    def runtime(self, package: Packages) -> Runtime:
        return Runtime.open(package("mistral-gqa", replace(RECIPE, images=1, prompt_tokens=60)), **STEPPED)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (Options(method="coarse"), "coarse picks rows within a step, which an engine cannot: take another method"),
            (Options(formats=ROWS["int8"]), "of float32, reads exact rows, not int8: give other formats"),
        ],
    )
    def test_what_engines_do_not_serve(self, runtime: Runtime, options: Options, message: str) -> None:
        """By ``open_images``, and by ``ask`` of an image session that others may ask."""
        session = runtime.open_images(IMAGES[:1])
        for refused in (lambda: runtime.open_images(IMAGES[:1], options), lambda: session.ask(FIRST, options)):
            with pytest.raises(BadInput, match=message) as refusal:
                refused()
            assert "\n" not in str(refusal.value)
        assert runtime.debug.backend is None

    def test_sizes_that_the_package_was_not_built_for(self, runtime: Runtime) -> None:
        with pytest.raises(BadInput, match=r"the picture takes .*, but the package was built for 60 and 1 images: ask"):
            runtime.open_images(IMAGES)
        with pytest.raises(BadInput, match=r"the question takes \d+ tokens, 0 of images, but the package was built"):
            runtime.open_images(IMAGES[:1]).ask("boat " * 70)

    def test_a_budget_packs_what_engines_read(self, package: Packages, checkpoint: Checkpoints) -> None:
        """Nobody asked for packed rows: those of a float32 engine stay exact, however small the budget."""
        for dtype, packs in ((torch.float32, False), (torch.float16, True)):
            on_cpu = Runtime.open(checkpoint("qwen2-tied", dtype=dtype), **STEPPED)
            options = Options(kv_budget=on_cpu.open_images(IMAGES).peak_bytes * 8 // 10)
            packed = on_cpu.open_images(IMAGES, options).stats.formats
            assert packed["core"] != "exact"
            runtime = Runtime.open(package("qwen2-tied", dtype=dtype), **STEPPED)
            if packs:
                assert runtime.open_images(IMAGES, options).stats.formats == packed
                continue
            with pytest.raises(DoesNotFit):
                runtime.open_images(IMAGES, options)


def test_an_older_package_is_refused_by_name(package: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose rows had a single line of scores."""
    with monkeypatch.context() as older:
        shape_of = Binding.__init__

        def init(self: Binding, name: str, shape: tuple[Any, ...], dtype: str) -> None:
            shape_of(self, name, (shape[0], shape[2]) if name == names.ROW_SCORES else shape, dtype)

        older.setattr(Binding, "__init__", init)
        out = package()
    with pytest.raises(Mismatch, match="was built for another form of the ONNX graphs"):
        Runtime.open(out, **STEPPED)


def test_several_prompts_of_the_command(
    package: Packages, checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    IMAGES[0].save(tmp_path / "picture.png")
    found = []
    for model in (package("mistral-gqa"), checkpoint("mistral-gqa", dtype=torch.float32)):
        arguments: list[Any] = ["run", "--model", model, "--image", tmp_path / "picture.png", "--json"]
        arguments += ["--prompt", FIRST, "--prompt", SECOND, "--max-new-tokens", 6]
        capsys.readouterr()
        assert run_app([str(each) for each in arguments]) == 0
        found.append(json.loads(capsys.readouterr().out))
    ours, oracle = ([each["text"] for each in document["answers"]] for document in found)
    assert ours == oracle
    assert found[0]["session"]["bytes_stored"] == found[1]["session"]["bytes_stored"]
    arguments += ["--kv-budget", "1kB"]
    assert (
        run_app([str(each) for each in [*arguments[:2], package("mistral-gqa"), *arguments[3:]]])
        == DoesNotFit.exit_code
    )
    assert "raise --kv-budget" in capsys.readouterr().err
