"""What a picture of an evaluation shows: few lines, each in a colour of its own and named where it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from matplotlib.colors import to_hex

from avl_edge.machine.profile import ANY, Figure, report
from avl_edge.measure.evaluate.plots import bytes_figure
from tests import ROOT
from tests.equipment.profiles import measured_profile

METHODS = json.loads((ROOT / "docs/measurements/methods.json").read_text())["result"]


def drawn(key: str, document: dict[str, Any] = METHODS) -> Any:
    return bytes_figure(document, key).axes[0]


def test_of_many_methods_few_are_coloured_and_named() -> None:
    names: dict[str, list[tuple[str, str]]] = {}
    for key in ("score", "ms_per_token"):
        axes = drawn(key)
        names[key] = [(text.get_text(), to_hex(text.get_color())) for text in axes.texts]
        assert 1 < len(names[key]) <= 7
        assert len({colour for _, colour in names[key]}) == len(names[key])
        heights = sorted(text.xy[1] for text in axes.texts)
        assert all(above - below > 0.05 for below, above in pairwise(heights))
        assert axes.get_xscale() == "log"
        assert axes.get_legend() is None
    assert sorted(names["score"]) == sorted(names["ms_per_token"])
    assert "full" in dict(names["score"])
    assert "in grey 15 more" in drawn("score").get_title()


def test_bytes_are_a_share_of_full_attention_s() -> None:
    row = METHODS["results"][0]
    one = {**METHODS, "results": [{**row, "bytes_stored_fraction": 0.25, "score_interval": None}]}
    axes = drawn("score", one)
    (x,), _ = axes.lines[0].get_data()
    assert x == 25
    assert "25 %" in [tick.get_text() for tick in axes.get_xticklabels()]


@pytest.mark.parametrize(
    ("ms", "spoken"),
    [(1.537e-08, "0.01537 ns"), (0.0123, "12.3 us"), (5208.3, "5208 ms"), (0.0, "0 ms"), (1e-12, "0 ms")],
)
def test_times_are_in_units_that_people_read(ms: float, spoken: str) -> None:
    profile = measured_profile()
    record = profile.models[ANY]
    costs = replace(record.costs, decode_ms_per_gb_of_rows=Figure(ms, "measured", "here"))
    text = report(replace(profile, models={ANY: replace(record, costs=costs)}))
    (line,) = [each for each in text.splitlines() if "decode, per GB of rows" in each]
    assert f" {spoken}  measured" in line
