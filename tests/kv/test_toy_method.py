"""A method is one file: this one is, and nothing of the package knows it. Registered, it answers, is planned, keeps a
budget, is shared by questions and is listed as the others are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from avl_edge import BadInput, Formats, Options, Runtime
from avl_edge.cli import run_app
from avl_edge.config import PromptShape, require
from avl_edge.kv.layout import PAGE_ROWS
from avl_edge.kv.methods import (
    METHODS,
    Kept,
    Method,
    PromptLayer,
    TierPeaks,
    Tiers,
    parameter,
    parameter_defaults,
    parameter_help,
    register,
)
from avl_edge.kv.methods.arithmetic import share, spread
from avl_edge.kv.methods.full import FullPolicy
from avl_edge.machine import profile
from avl_edge.model.known import shape_of_checkpoint
from avl_edge.planning.estimate import PlanRequest, plan
from tests import ROOT
from tests.conftest import Checkpoints
from tests.equipment import oracle_baselines
from tests.equipment.checkpoints import random_image
from tests.equipment.held_rows import held_rows
from tests.equipment.image_sessions import FIRST, SECOND, is_empty
from tests.equipment.oracle import load_model
from tests.equipment.pixels import stacked

IMAGE, STEPS = random_image(3, 56), 24


@dataclass(frozen=True)
class Thinned(Method):
    """All stored rows are core."""

    keep: float = parameter(50, "percent of image rows stored, evenly spaced", "N")

    name: ClassVar[str] = "thinned"
    summary: ClassVar[str] = "image rows at even distances"
    source: ClassVar[str] = "a test"
    shared_with: ClassVar[str] = "thinned with keep=100"

    def __post_init__(self) -> None:
        require(0 < self.keep <= 100, f"keep (N) must be above 0 and at most 100 percent, not {self.keep:g}")

    @classmethod
    def check_formats(cls, formats: Formats) -> None:
        require(not formats.core.startswith("lowrank"), "thinned leaves too few rows for a basis: choose int8 or int4")

    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        text = prompt.prefix + prompt.suffix + steps
        return TierPeaks(layers * text, layers * share(prompt.images, self.keep), 0)

    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG002
        return Tiers.of(prompt, steps, prompt.prefix + prompt.suffix + steps, share(prompt.images, self.keep))

    @property
    def shared_percent(self) -> float | None:
        return 100 if self.keep == 100 else None

    def policy(self, prompt: PromptShape, layers: int) -> ThinnedPolicy:  # noqa: ARG002
        return ThinnedPolicy(share(prompt.images, self.keep))

    @classmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[Thinned]:
        for keep in [fixed["keep"]] if "keep" in fixed else range(100, 0, -1):
            yield cls(keep)


class ThinnedPolicy(FullPolicy):
    def __init__(self, stored: int) -> None:
        self._stored = stored

    def keep_prompt(self, view: PromptLayer) -> Kept:
        count = int(view.is_image.sum())
        chosen = np.zeros(count, dtype=np.bool_)
        chosen[np.arange(self._stored) * count // max(self._stored, 1)] = True
        image = spread(chosen, view.is_image)
        return Kept(stored=~view.is_image | image, core=image)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register(Thinned)
    yield
    del METHODS[Thinned.name]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    IMAGE.save(tmp_path / "cam.png")
    return str(tmp_path / "cam.png")


def test_it_answers_as_the_oracle(checkpoint: Checkpoints) -> None:
    """Transformers, from whom every second image row is hidden after the prompt."""
    directory = checkpoint("llama-mha", dtype=torch.float64)
    runtime = Runtime.load(directory, threaded=False)
    request = runtime.prepare([IMAGE], FIRST, Options("thinned", max_new_tokens=STEPS))
    generation, prompt = runtime.submit(request), request.prompt
    pixels = torch.from_numpy(stacked(prompt)).double()
    case = oracle_baselines.Case(load_model(directory), list(prompt.token_ids), pixels, STEPS)
    hidden = case.images[1::2]
    assert len(hidden) == 8
    truth = oracle_baselines.answer(
        case,
        [case.causal] * case.depth,
        [list(range(len(prompt)))] * case.depth,
        lambda _layer, _step, rows, _weights: [place for place in rows if place not in hidden],
    )
    for expected in truth:
        event = next(generation)
        assert event.token_id == expected.token
        if event.finish_reason is None:
            assert held_rows(generation.cache) == expected.rows
    assert generation.result().settings == {"keep": 50}


def test_its_estimate_is_what_the_runtime_holds(checkpoint: Checkpoints) -> None:
    directory = checkpoint("llama-mha")
    options = Options("thinned", {"keep": 30}, max_new_tokens=STEPS)
    generation = Runtime.load(directory, threaded=False).generate([IMAGE], FIRST, options)
    result, text = generation.result(), len(generation.prompt) - 16
    request = PlanRequest(
        image_tokens=16,
        prompt_tokens=text,
        system_tokens=generation.prompt.spans[0].start,
        max_new_tokens=STEPS,
        method="thinned",
        parameters={"keep": 30},
    )
    found = plan(shape_of_checkpoint(directory, "toy"), profile.named("agx-orin-64", "MAXN"), request)
    held = {"text": text + STEPS - 1, "core": 4, "secondary": 0, "freed": 12}
    assert list(result.kv.layers) == [held] * 4
    assert found.to_dict()["kv"]["layers"] == tuple(result.kv.layers)
    assert (found.kv.bytes_peak, found.kv.bytes_full) == (result.kv.bytes_peak, result.kv.bytes_full)
    assert found.time.prefill_ms > 0


def test_its_ladder_keeps_a_budget(checkpoint: Checkpoints) -> None:
    """The most rows whose pages the budget holds: per layer the text, the answer and N percent of 16."""
    runtime = Runtime.open(checkpoint("llama-mha"), threaded=False)
    shape = runtime.kv_shape
    whole = runtime.prepare([IMAGE], FIRST, Options("full", max_new_tokens=STEPS))
    text = len(whole.prompt) - 16 + STEPS - 1

    def peak(keep: int) -> int:
        return -(-shape.layers * (text + keep * 16 // 100) // PAGE_ROWS) * PAGE_ROWS * shape.row_bytes

    budget = peak(60)
    found = runtime.prepare([IMAGE], FIRST, Options("thinned", kv_budget=budget, max_new_tokens=STEPS)).plan
    assert found.method == Thinned(max(keep for keep in range(1, 101) if peak(keep) <= budget))
    assert found.peak_bytes <= budget < whole.plan.peak_bytes == peak(100)


def test_questions_share_its_rows(checkpoint: Checkpoints) -> None:
    runtime = Runtime.load(checkpoint("llama-mha"), threaded=False)
    options = Options("thinned", {"keep": 100}, max_new_tokens=12)
    alone = [runtime.generate([IMAGE], each, Options(max_new_tokens=12)).result() for each in (FIRST, SECOND)]
    with runtime.open_images([IMAGE], options) as session:
        together = [session.ask(each) for each in (FIRST, SECOND)]
        for generation, expected in zip(together, alone, strict=True):
            result = generation.result()
            assert (result.method, result.token_ids) == ("thinned", expected.token_ids)
            assert result.kv.bytes_shared > 0
        with pytest.raises(BadInput, match="thinned stores rows for one question alone: give thinned with keep=100"):
            session.ask(FIRST, Options("thinned"))
        with pytest.raises(BadInput, match="choose one of full, distinct, coarse, avl, thinned"):
            session.ask(FIRST, Options("h2o"))
    assert is_empty(runtime)


def test_the_command_line_knows_it(checkpoint: Checkpoints, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run_app(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, err = call("methods")
    assert (code, err) == (0, "")
    assert out.endswith(
        "\n\nthinned: image rows at even distances\n  a test\n"
        "  keep=50  N: percent of image rows stored, evenly spaced\n"
    )
    listed = json.loads(call("methods", "--json")[1])[-1]
    assert listed["name"] == "thinned"
    help_ = "percent of image rows stored, evenly spaced"
    assert listed["parameters"] == [{"name": "keep", "default": 50, "help": help_, "symbol": "N", "is_layer": False}]
    assert (parameter_help("keep"), parameter_defaults("keep")) == (f"N: {help_}.", "thinned 50")
    directory = str(checkpoint("llama-mha"))
    asked = ["run", "--model", directory, "--image", picture, "--prompt", FIRST, "--max-new-tokens", "4", "--json"]
    code, out, err = call(*asked, "--method", "thinned", "--set", "keep=25", "--kv-budget", "1GB")
    document = json.loads(out)
    assert (code, document["settings"]) == (0, {"keep": 25})
    assert {layer["core"] for layer in document["kv"]["layers"]} == {4}
    assert err.startswith("avl-edge: thinned N 25 holds at most ")
    assert call("plan", "--model", directory, "--method", "thinned", "--set", "keep=25")[0] == 0
    for options, message in [
        (["--set", "keep=0"], "keep (N) must be above 0"),
        (["--set", "core=3"], "takes no 'core', a parameter of avl, attentionpack, coarse; it takes keep"),
        (["--kv-format", "lowrank:8"], "thinned leaves too few rows for a basis"),
        (["--method", "avl", "--set", "keep=3"], "takes no 'keep', a parameter of thinned"),
    ]:
        code, out, err = call(*asked, "--method", "thinned", *options)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_nothing_of_the_package_names_it() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "avl_edge").rglob("*.py")]
    assert len(sources) > 100
    assert not any("thinned" in text.lower() for text in sources)


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(BadInput, match=r"'thinned' is .*\.Thinned already: give .*\.Thinned another name"):
        register(Thinned)
    named = {"name": "other", "summary": "one more", "source": "a test"}
    for parts, message in [
        ({"name": "Two words"}, "needs a name of lower-case letters"),
        ({**named, "summary": ""}, "leaves out summary"),
        ({**named, "tiers": Method.tiers, "ladder": Method.ladder}, "leaves out ladder, tiers"),
        ({**named, "__annotations__": {"own": "int"}, "own": 3}, "fields that are no parameters: make own by"),
    ]:
        kind = type("Other", (Thinned,), parts)
        with pytest.raises(BadInput, match=message):
            register(dataclass(frozen=True)(kind))
    with pytest.raises(BadInput, match="must be a dataclass"):
        register(type("Other", (Thinned,), named))
    assert "other" not in METHODS
