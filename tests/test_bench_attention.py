"""`avl-edge bench attention`: every way computes the same attention, and the document has its shape."""

from __future__ import annotations

import json

import pytest
import torch

from avl_edge import bench
from avl_edge.bench import Case
from avl_edge.cli import run_app
from avl_edge.errors import BadInput


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_ways_compute_the_same(batch: int, kv_heads: int) -> None:
    """Times can be compared only where the results are equal; attention to all rows is so where all are selected."""
    case = Case(batch, 6, kv_heads, 16, 40, 0.3, "float32")
    assert case.core_rows == 12
    ways = bench._ways(case)
    results = {name: [_result(function) for function in functions] for name, functions in ways.items()}
    expected = results["native"][0]
    for name in ("slice_then_multiply", "contiguous"):
        for result in results[name]:
            torch.testing.assert_close(result, expected)
    assert not torch.allclose(results["full"][0], expected, atol=1e-3)
    whole = bench._ways(Case(batch, 6, kv_heads, 16, 40, 1.0, "float32"))
    for function in whole["full"]:
        torch.testing.assert_close(_result(function), _result(whole["native"][0]))


def _result(function: object) -> torch.Tensor:
    out = function()  # type: ignore[operator]
    return (out[0] if isinstance(out, tuple) else out).flatten()


def test_document(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch", "1", "--batch", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--rows", "50"]
    assert run_app(["bench", "attention", *options, "--rounds", "2", "--dtype", "float32", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"threads", "torch", "native", "cpu"} <= document["machine"].keys()
    assert [case["batch"] for case in document["cases"]] == [1, 2]
    for case in document["cases"]:
        expected = {"heads": 4, "kv_heads": 2, "head_dim": 8, "rows": 50, "core_fraction": 0.3, "dtype": "float32"}
        assert expected.items() <= case.items()
        assert case["ms"].keys() == {"native", "slice_then_multiply", "full", "contiguous"}
        assert all(ms > 0 for ms in case["ms"].values())
    assert run_app(["bench", "attention", *options, "--rounds", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="4 heads cannot be shared by 3 key/value heads"):
        Case(1, 4, 3, 8, 50, 0.3, "float32")
    for options, message in ((["--core", "0"], "core fraction"), (["--dtype", "int3"], "'int3' must be one of")):
        assert run_app(["bench", "attention", *options]) == 2
        assert message in capsys.readouterr().err
