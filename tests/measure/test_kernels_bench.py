"""`avl-edge bench attention --formats`: packed rows timed beside exact ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from avl_edge.cli import run_app
from avl_edge.errors import BadInput
from avl_edge.kv.formats import decode
from avl_edge.kv.layout import UNIT, Format
from avl_edge.measure import bench
from avl_edge.measure.bench import Case

SMALL = ["--batch", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--rows", "90", "--rounds", "1"]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_packed_rows_are_the_rows_that_torch_attends(name: str) -> None:
    """They differ by half a step of int8 at most, and a whole one of int4: of the largest value over 127 or 8, rounded
    to float16, by up to 2^-11."""
    case = Case(2, 4, 2, 64, 90, 0.3, "float32", name)
    ways: dict[str, Any] = bench.attention_ways(case)
    query, (part,), kv_heads, _ = ways["native"][0].args
    _, *torchs = ways["contiguous"][0].args
    for arena, rows in zip((part.keys, part.values), torchs, strict=True):
        records = arena.view(-1, UNIT)[part.rows[:, None] + torch.arange(case.record_step // UNIT)].flatten(1)
        apart = decode(Format(name), records, kv_heads, 64).unflatten(0, (2, -1)).transpose(1, 2)
        most = rows.abs().max() / (2 * 127 if name == "int8" else 8) * (1 + 2**-7)
        assert (apart - rows).abs().max() <= most + 1e-6  # what float32 adds to values of up to 8
    assert ways["native"][0]()[0].shape == query.shape


def test_a_case_for_each_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["bench", "attention", *SMALL, "--formats", "exact,int8,int8/int4,int4", "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert [case["format"] for case in cases] == ["exact", "int8", "int8/int4", "int4"]
    assert all(ms > 0 for case in cases for ms in case["ms"].values())
    assert run_app(["bench", "attention", *SMALL, "--formats", "exact,int4"]) == 0
    _, exact, packed = capsys.readouterr().out.splitlines()
    assert packed.endswith("  int4")
    assert not exact.endswith("t")


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="'int5' must be one of exact, int8, int8/int4, int4"):
        Case(1, 4, 2, 8, 50, 0.3, "float32", "int5")
    with pytest.raises(BadInput, match="size 7 cannot be packed"):
        Case(1, 4, 2, 7, 50, 0.3, "float32", "int8")
    assert run_app(["bench", "attention", *SMALL, "--formats", "int8", "--plot", "plot.svg"]) == 2
    assert "--plot draws exact rows only" in capsys.readouterr().err
