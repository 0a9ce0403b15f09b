"""The pages of ``docs/`` say what the measurements say: their tables are made from them, their sentences agree."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests import ROOT
from tools.docs import markdown
from tools.docs.pages import BLOCK, PAGES, TABLES, renewed, without_blocks

README = ROOT / "README.md"
HAND_WRITTEN = [README, ROOT / "CONTRIBUTING.md", *PAGES]
FIGURE = re.compile(r"\d+(?:\.\d+)? %|\d+\.\d+")
"""What a measurement looks like in a sentence: percents and decimals."""
NO_FIGURE = re.compile(r"`[^`]*`|!?\[[^\]]*\]\([^)]*\)|LLaVA-1\.5|PPCI\(10 %\)")
"""Names and options with digits of their own."""


def _measured(name: str) -> Any:
    return json.loads((ROOT / "docs" / "measurements" / f"{name}.json").read_text())


def _prose(page: Path) -> str:
    """What is written by hand, without programs, on one line."""
    text = re.sub(r"^```.*?^```", "", without_blocks(page.read_text()), flags=re.DOTALL | re.MULTILINE)
    return " ".join(text.split())


def _scores(name: str) -> dict[tuple[str, float], float]:
    """Percent of right answers by setting and share of full attention's bytes."""
    return {(row["method"], row["kv_fraction"]): 100 * row["score"] for row in _measured(name)["result"]["results"]}


def _read(setting: str, share: float) -> float:
    rows = {(row["method"], row["kv_fraction"]): row for row in _measured("methods")["result"]["results"]}
    return float(rows[setting, share]["bytes_read_fraction"])


def _quality() -> list[str]:
    score, unseen = _scores("methods"), _scores("methods_unseen")
    full, packed = score["full", 1], "distinct:format=int4"
    (text,) = (row for row in _measured("text_formats")["results"] if row["method"] == "full:format=int4")
    apart = max(abs(full - score[packed, share]) for share in (0.25, 0.125, 0.0625))
    whole = [score[f"full:format={name}", 1] for name in ("int8", "int8/int4", "int4")]
    unseen_below = [unseen["full", 1] - unseen[packed, share] for share in (0.25, 0.125, 0.0625)]
    return [
        f"A quarter of the image rows, exact, gives {score['distinct', 0.25]:.1f} % right answers, as all of them do, "
        f"and {score[packed, 0.25]:.1f} % at the same bytes in int4.",
        f"with `prompt_mean=1` or as published, gives {score['avl:prompt_mean=1', 0.25]:.1f} and "
        f"{score['avl', 0.25]:.1f} %, and `h2o` {score['h2o', 0.25]:.1f} %: "
        f"{full - score['avl:prompt_mean=1', 0.25]:.0f} to {full - score['h2o', 0.25]:.0f} points less",
        f"All rows in int8, int8/int4 or int4 give {min(whole):.1f} to {max(whole):.1f} % where exact rows give "
        f"{full:.1f} %. At "
        f"12.5 % of the bytes, 42 % of the image rows in int4 give {score[packed, 0.125]:.1f} %, 10 % of them stored "
        f"exactly {score['distinct', 0.125]:.1f} %.",
        # The aims that were set.
        "within 0.5 points of full attention at 25 % of the bytes and within 1 at 12.5 %, reading at most 25 %",
        f"`distinct` in int4 is within {apart:.1f} points of it at 25, 12.5 and 6.25 %",
        f"above H2O from 25 % down. At 50 % it is below H2O, {score['avl', 0.5]:.1f} against {score['h2o', 0.5]:.1f} %",
        f"`distinct` in int4 is {abs(unseen_below[0]):.1f}, {unseen_below[1]:.1f} and {unseen_below[2]:.1f} points "
        "below `full`",
        "hold 80 % of the picture's attention",
        f"int4 keys cost {100 * text['perplexity_change']:.1f} %, where 2 % was the aim",
    ]


def _speed() -> list[str]:
    ratio = _measured("decode")["ratios"]
    attention, step = "attention_ms_per_token_avl_to_full_at", "ms_per_token_avl_to_full_at"
    return [
        f"Attention takes {ratio[f'{attention}_576']:.2f} of full attention's time with 576 image rows and "
        f"{ratio[f'{attention}_2340']:.2f} with 2,340; the whole step takes {ratio[f'{step}_576']:.2f} and "
        f"{ratio[f'{step}_2340']:.2f} of it",
        # The aims that were set.
        "at most 15 % in the median of the time per token, and 0 to 10 % more memory planned than used",
    ]


def _demo_model() -> list[str]:
    weights = ROOT / "avl_edge" / "demo" / "model.safetensors"
    with safe_open(weights, "np") as file:
        parameters = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    layers = _measured("demo_model_attention")["result"]["layers"]
    holds = sorted(100 * layer["holds_80"] for layer in layers)
    kept = [100 * layer["previous_step"] for layer in layers]
    return [
        f"{parameters / 1e6:.1f} million parameters ({weights.stat().st_size / 1e6:.1f} MB;",
        "The aims were 92 % of all, which is reached, and 97 % of single items, which is not.",
        f"In five of its layers {holds[3]:.0f} to {holds[-1]:.0f} % of the image tokens hold 80 % of the picture's "
        f"attention, in the other three {holds[0]:.0f} to {holds[2]:.0f} %; of a layer's top tenth a step keeps "
        f"{min(kept):.1f} to {max(kept):.1f} % from the step before.",
    ]


STATEMENTS = {"quality.md": _quality, "speed.md": _speed, "demo-model.md": _demo_model}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_measurements_make(page: Path) -> None:
    assert renewed(page.read_text()) == page.read_text(), "run python -m tools.docs"


def test_every_table_stands_on_one_page() -> None:
    shown = Counter(name for page in PAGES for name, _ in BLOCK.findall(page.read_text()))
    assert shown == Counter(TABLES.keys())


def test_another_measurement_makes_another_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measurements = shutil.copytree(markdown.MEASUREMENTS, tmp_path / "measurements")
    document = json.loads((measurements / "methods_unseen.json").read_text())
    document["result"]["results"][1]["score"] = 0.1234
    (measurements / "methods_unseen.json").write_text(json.dumps(document))
    monkeypatch.setattr(markdown, "MEASUREMENTS", measurements)
    page = ROOT / "docs" / "quality.md"
    changed = set(renewed(page.read_text()).splitlines()) - set(page.read_text().splitlines())
    assert changed == {"| `distinct`, int4 | 12.3 | 91.8 | 91.0 |"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<!-- table: unseen -->\nold\n", "not every block ends"),
        ("<!-- table: unseen -->\n<!-- table: camera -->\n<!-- end -->", "not every block ends"),
        ("<!-- end -->", "not every block ends"),
        ("<!-- table: unsaid -->\n<!-- end -->", "no such table: unsaid"),
    ],
)
def test_broken_blocks_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        renewed(text)


@pytest.mark.parametrize("name", STATEMENTS)
def test_sentences_agree_with_the_measurements(name: str) -> None:
    """Each figure of a page's own sentences is in one that is made here from the measurements."""
    prose = _prose(ROOT / "docs" / name)
    for statement in STATEMENTS[name]():
        assert statement in prose
        prose = prose.replace(statement, "")
    assert not FIGURE.findall(NO_FIGURE.sub("", prose))


def test_orders_that_the_sentences_tell() -> None:
    score = _scores("methods")
    shares = (0.5, 0.25, 0.125, 0.09, 0.0625)
    for share in shares:
        assert score["avl", share] > max(score.get(("fastv", share), 0), score["streaming", share])
        assert (score["avl", share] > score["h2o", share]) == (share <= 0.25)
        by_question = [score[key] for key in score if key[0].startswith("avl:prompt_mean=1") and key[1] == share]
        assert by_question
        assert min(by_question) > score["h2o", share]
    assert score["full:format=int8", 1] == score["full:format=int4", 1]
    assert _read("avl", 0.5) / _read("h2o", 0.5) == pytest.approx(0.8, abs=0.02)  # reads a fifth less
    assert _read("avl:drift=20", 0.25) / _read("avl", 0.25) == pytest.approx(1.1, abs=0.02)  # reads a tenth more
    assert sum(share > 0.5 for share in _measured("methods")["result"]["attention"]["holds"]) == 5
    assert _measured("methods")["result"]["attention"]["questions"] == 60
    intervals = [row["score_interval"] for row in _measured("kvpress")["result"]["results"]]
    half = [50 * (high - low) for low, high in intervals]
    assert 4 <= min(half) < max(half) <= 10 + 1e-6  # "4 to 10 points of chance either way"


def test_what_other_pages_say() -> None:
    """README, usage and device quote a few figures of the same measurements."""
    rows = {row["method"]: row for row in _measured("methods")["result"]["results"] if row["kv_fraction"] == 1}
    int8, pair, int4 = (rows[f"full:format={name}"] for name in ("int8", "int8/int4", "int4"))
    assert 0.5 <= int8["bytes_stored_fraction"] < 0.55
    stored = f"{100 * int4['bytes_stored_fraction']:.0f} %"
    assert f"in about half of the bytes, `int4` in {stored} of them" in _prose(ROOT / "docs" / "usage.md")
    answers = (
        f"{100 * pair['score']:.1f} % right answers on {pair['questions']} questions to the demo model, where exact "
    )
    assert f"{answers}rows give {100 * rows['full']['score']:.1f} %" in _prose(ROOT / "docs" / "device.md")
    score, questions = _scores("methods"), _measured("methods")["result"]["questions"]
    assert score["distinct", 0.25] >= score["full", 1]
    fewer = f"on {questions} questions the demo model answered as well with fewer rows"
    assert fewer in _prose(ROOT / "docs" / "usage.md")
    cases = _measured("cuda_resources")["cases"]
    assert all(kernel["spills"] == 0 for case in cases for kernel in case["kernels"].values())
    foreign = _measured("demo_model_foreign")["result"]
    assert (len(foreign), sum(each["truth"] == each["said"] for each in foreign)) == (6, 1)
    demo = _measured("demo_model_quality")["result"]
    assert demo["exact_match"] >= 0.92
    assert demo["by_group"]["single item"]["exact_match"] < 0.97


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    for path, _, anchor in (link.partition("#") for link in links if not link.startswith("http")):
        target = page.parent / path if path else page
        assert target.is_file(), path
        assert not anchor or anchor in _anchors(target), anchor


def test_every_plot_is_shown() -> None:
    shown = {path.name for path in (ROOT / "docs" / "plots").iterdir()}
    assert shown == {name for page in PAGES for name in re.findall(r"\]\(plots/([\w.]+)\)", page.read_text())}


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120
