"""The measured table, what a budget makes of it, and the presets that name it."""

from __future__ import annotations

import json
import subprocess
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_edge import BadInput, Formats, Options, Runtime
from avl_edge.config import KvShape, PromptShape
from avl_edge.errors import DoesNotFit
from avl_edge.kv.budget import fit, kv_plan
from avl_edge.kv.cache import prompt_shape
from avl_edge.kv.methods import METHODS, Avl, Choice, Full, candidates
from avl_edge.kv.methods.notation import parse
from avl_edge.kv.quality import PRESETS, at_share, choices, explain, preset, ranked, table
from avl_edge.kv.quality.ranking import rising, stores_all
from tests.equipment.checkpoints import random_image
from tests.equipment.command_line import COMMAND

SHAPE = KvShape(layers=8, kv_heads=4, head_dim=64, itemsize=2)


def test_the_table_is_whole() -> None:
    points = table().points
    assert table().full.stored == table().full.read == 1
    assert len({(point.setting, point.kv_fraction) for point in points}) == len(points)
    for point in points:
        assert 0 < point.stored <= 1
        assert point.read > 0
        assert 0 <= point.low <= point.score <= point.high <= 1
        assert parse(point.setting).name in METHODS


@given(st.lists(st.floats(0, 1), max_size=12))
def test_rising_is_the_nearest_that_never_falls(values: list[float]) -> None:
    found = rising(values)
    assert len(found) == len(values)
    assert all(a <= b + 1e-12 for a, b in pairwise(found))
    assert sum(found) == pytest.approx(sum(values))
    if values == sorted(values):
        assert found == pytest.approx(values)


@given(
    prompt=st.builds(PromptShape, st.integers(1, 40), st.integers(200, 1200), st.integers(2, 60)),
    steps=st.integers(0, 200),
    budgets=st.tuples(st.floats(0.1, 1.1), st.floats(0.1, 1.1)).map(sorted),
)
def test_more_memory_is_never_expected_to_answer_worse(prompt: PromptShape, steps: int, budgets: list[float]) -> None:
    order = list(ranked())
    full = Full().peak_rows(prompt, steps, SHAPE.layers) * SHAPE.row_bytes
    places = []
    for budget in budgets:
        try:
            found = fit(iter(order), SHAPE, prompt, steps, int(budget * full))
        except DoesNotFit:
            places.append(len(order))
        else:
            assert found.peak_bytes <= int(budget * full)
            places.append(order.index(Choice(found.method, found.formats)))
    assert places[0] >= places[1]


def test_packing_comes_before_leaving_rows_out() -> None:
    """Half of the bytes hold all rows in int4: none of them has to go, whatever else was measured to answer as well."""
    prompt = PromptShape(2, 576, 11)
    full = kv_plan(Full(), Formats(), SHAPE, prompt, 0)
    found = fit(choices(None, {}, True, None, SHAPE), SHAPE, prompt, 0, full.peak_bytes // 2)
    assert sum(found.method.peak_tiers(prompt, 0, SHAPE.layers)) == prompt.length * SHAPE.layers


def test_what_fits_whole_stays_whole() -> None:
    assert ranked()[0] == Choice(Full(), Formats())
    assert next(choices(None, {}, True, None, SHAPE)) == Choice(Full(), Formats())
    assert list(choices(None, {}, False, None, SHAPE)) == [Choice(Full(), Formats())]


def test_formats_that_were_given_stay() -> None:
    given_formats = Formats("int8", "int8", "int8")
    found = list(choices(None, {}, True, given_formats, SHAPE))
    assert found
    assert {each.formats for each in found} == {given_formats}


@pytest.mark.parametrize("name", ["exact", "int8", "lowrank:16"])
def test_given_formats_do_not_keep_a_budget_from_dropping_rows(name: str) -> None:
    """Settings that others beat in other formats, or that were never measured, are all there is in these."""
    prompt, asked = PromptShape(10, 600, 20), Formats("exact", name, name)
    whole = kv_plan(Full(), asked, SHAPE, prompt, 20).peak_bytes
    found = fit(choices(None, {}, True, asked, SHAPE), SHAPE, prompt, 20, whole // 2)
    assert found.formats == asked
    assert found.peak_bytes <= whole // 2


@given(share=st.floats(0.02, 1), images=st.integers(200, 1200))
def test_a_share_is_kept_to_the_page(share: float, images: int) -> None:
    prompt = PromptShape(12, images, 20)
    page = SHAPE.row_bytes * 16
    ladder = [Choice(method, Formats()) for method in Avl.ladder({})]
    try:
        found = at_share(ladder, share, prompt, SHAPE)
    except DoesNotFit as refusal:
        assert "the least is" in str(refusal)  # noqa: PT017
    else:
        assert found.peak_bytes < share * prompt.length * SHAPE.layers * SHAPE.row_bytes + page


@pytest.mark.parametrize("name", PRESETS)
def test_presets_answer(name: str) -> None:
    runtime = Runtime.load("demo")
    result = runtime.generate(
        [random_image(3, (300, 200))], "What is the speed?", Options(preset=name, max_new_tokens=4)
    ).result()
    assert result.token_ids
    share = preset(name).share
    if share is not None:
        # The share is of the prompt's rows, rounded up to pages; those of the answer come on top.
        assert result.kv.bytes_stored <= share * result.kv.bytes_full + 4 * 16 * runtime.kv_shape.row_bytes * 8
    assert str(round(100 * table().full.score, 1)) in preset(name).why or name == "paper"


def test_lossless_and_small_are_what_they_say() -> None:
    points = {(point.setting, point.kv_fraction): point for point in table().points}
    lossless, small = preset("lossless"), preset("small")
    assert lossless.share == 1
    assert small.share is not None
    cheap = min((each for each in table().of(lossless.setting) if stores_all(each)), key=lambda each: each.stored)
    assert cheap.score >= table().full.score - 0.005
    others = [point for point in table().points if point.score >= table().full.score - 0.005 and stores_all(point)]
    cheaper = [parse(point.setting).formats for point in others if point.stored < cheap.stored]
    rises = table().text.rises
    assert all(max(rises.get(name, 1) for name in formats.by_tier().values()) > 0.005 for formats in cheaper if formats)
    formats = parse(lossless.setting).formats
    assert formats
    assert all(rises[name] <= 0.005 for name in formats.by_tier().values())
    request = Runtime.open().prepare([random_image(3, (300, 200))], "What is the speed?", Options(preset="lossless"))
    tiers = request.plan.method.peak_tiers(prompt_shape(len(request.prompt), request.prompt.spans), 0, 8)
    assert sum(tiers) == 8 * len(request.prompt)
    assert points[small.setting, small.share].stored <= 0.13


def test_a_preset_stands_alone() -> None:
    with pytest.raises(BadInput, match="there is no preset"):
        Runtime.open().prepare([], "hi", Options(preset="tiny"))
    for other in ({"method": "full"}, {"parameters": {"core": 3}}, {"formats": Formats("int8")}, {"kv_budget": "3MB"}):
        with pytest.raises(BadInput, match="give none beside it"):
            Options(preset="small", **other)  # type: ignore[arg-type]


def test_explanations() -> None:
    assert "nothing is packed" in explain(Choice(Full(), Formats()), asked=False)
    packed = next(each for each in ranked() if each.formats != Formats())
    assert f"{table().questions} questions" in explain(packed, asked=False)
    assert "of all settings that fit" in explain(packed, asked=False)
    assert "of all settings" not in explain(packed, asked=True)
    unknown = Choice(Avl(secondary=33.3), Formats())
    assert explain(unknown, asked=True) == "it was asked for; it is not in the measured table"
    assert "asked for" not in explain(unknown, asked=False)


def test_what_was_measured_is_what_is_expected() -> None:
    """On another shape a setting may weigh a little less than where it was measured: not a worse answer."""
    for point in table().points:
        if point.setting in ("full:format=int8", "full:format=int4"):
            choice = next(candidates("full", {}, False, parse(point.setting).formats))
            assert f"{100 * table().full.score:.1f} % right" in explain(choice, asked=True)


def test_several_prompts_say_what_the_budget_picked() -> None:
    command = [*COMMAND, "--image", "examples/cockpit.png", "--prompt", "What is the speed?", "--prompt", "Which gear?"]
    done = subprocess.run(
        [*command, "--kv-budget", "3MB", "--explain"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "was asked for" not in done.stderr


def test_explain_on_the_command_line() -> None:
    asked = ["--image", "examples/cockpit.png", "--prompt", "What is the speed?"]
    command = [*COMMAND, *asked, "--kv-budget", "1.5MB", "--explain", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["kv"]["bytes_peak"] <= 1_500_000
    assert "expected to answer best" in done.stderr


@pytest.mark.parametrize(
    ("text", "name", "parameters", "formats"),
    [
        ("full", "full", {}, None),
        ("avl:refresh=1:core=20", "avl", {"refresh": 1, "core": 20}, None),
        ("coarse:format=int4:mass=90", "coarse", {"mass": 90}, Formats("int4", "int4", "int4")),
        ("avl:secondary_format=lowrank:64+int8", "avl", {}, Formats("exact", "exact", "lowrank:64+int8")),
        ("attentionpack:format=lowrank:32", "attentionpack", {}, Formats("exact", "lowrank:32", "lowrank:32")),
    ],
)
def test_notation(text: str, name: str, parameters: dict[str, float], formats: Formats | None) -> None:
    found = parse(text)
    assert (found.name, found.parameters, found.formats) == (name, parameters, formats)


@pytest.mark.parametrize(
    "text",
    [
        "avl:core",
        "avl:core=x",
        "avl:core=inf",
        "avl:core=nan",
        "avl:core=lowrank:8",
        "avl:format=int9",
        "avl:text_format=lowrank:8",
    ],
)
def test_notation_that_is_none(text: str) -> None:
    with pytest.raises(BadInput):
        parse(text)
