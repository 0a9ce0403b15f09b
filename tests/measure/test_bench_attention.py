"""`avl-edge bench attention`: every way computes the same attention, and the document has its shape."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from avl_edge.cli import run_app
from avl_edge.errors import BadInput
from avl_edge.measure import bench
from avl_edge.measure.bench import Case


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_ways_compute_the_same(batch: int, kv_heads: int) -> None:
    """Times can be compared only where the results are equal; attention to all rows is so where all are selected."""
    case = Case(batch, 6, kv_heads, 16, 40, 0.3, "float32")
    assert case.core_rows == 12
    ways = bench.attention_ways(case)
    results = {name: [_result(function) for function in functions] for name, functions in ways.items()}
    expected = results["native"][0]
    for name in ("slice_then_multiply", "contiguous"):
        for result in results[name]:
            torch.testing.assert_close(result, expected)
    assert not torch.allclose(results["full"][0], expected, atol=1e-3)
    whole = bench.attention_ways(Case(batch, 6, kv_heads, 16, 40, 1.0, "float32"))
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
    for options, message in (
        (["--core", "0"], "--core must be above 0"),
        (["--core", "nan"], "--core must be above 0"),
        (["--dtype", "int3"], "'int3' must be one of"),
        (["--rows", str(10**30)], "more than a pool can number"),
        (["--head-dim", str(10**15)], "are free: give fewer or smaller ones"),
        (["--threads", str(10**6)], "--threads"),
        (["--plot", "plot.pdf"], "plot.pdf must end in .svg or .png"),
        (["--plot", "/nowhere/plot.svg"], "there is no folder /nowhere"),
    ):
        assert run_app(["bench", "attention", *options]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""


def test_percent_is_exact() -> None:
    """33.3 % of 1,000 are 333 rows, however the binary fractions fall."""
    assert Case(1, 4, 2, 8, 1000, 0.333, "float32").core_rows == 333


SMALL = ["--heads", "4", "--kv-heads", "4", "--kv-heads", "2", "--head-dim", "8", "--rows", "1000", "--rounds", "1"]


class TestPlot:
    @pytest.fixture(autouse=True)
    def _matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    @pytest.fixture
    def _measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Known times: ways differ by powers of ten, and batches by their size."""

        def known(case: Case, _: int) -> dict[str, object]:
            ways = ("native", "slice_then_multiply", "contiguous", "full")
            return {**asdict(case), "ms": {way: case.batch * 10.0**power for power, way in enumerate(ways)}}

        monkeypatch.setattr(bench, "attention", known)

    @pytest.mark.usefixtures("_measured")
    def test_curves_hold_the_times(self, capsys: pytest.CaptureFixture[str]) -> None:
        from avl_edge.measure.evaluate import attention_plot

        batches = ["--batch", "16", "--batch", "1", "--batch", "4"]
        assert run_app(["bench", "attention", *SMALL, *batches, "--core", "33.3", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        panels = {kv_heads: [case for case in document["cases"] if case["kv_heads"] == kv_heads] for kv_heads in (4, 2)}
        figure = attention_plot.attention_figure(document, panels)
        assert [axes.get_title() for axes in figure.axes] == ["4 key/value heads", "2 key/value heads"]
        assert "33.3 % of 1000 rows" in figure.get_suptitle()
        (legend,) = figure.legends
        labels = [text.get_text() for text in legend.get_texts()]
        assert [label.split(",")[0] for label in labels] == ["ours", "slice", "contiguous", "all rows"]
        for drawn in (figure, attention_plot.attention_figure(document, {4: panels[4]})):
            drawn.canvas.draw()
            (frame,) = (legend.get_window_extent() for legend in drawn.legends)
            assert 0 <= frame.x0 < frame.x1 <= drawn.bbox.width
        for axes in figure.axes:
            assert [line.get_label() for line in axes.lines] == labels
            for power, line in enumerate(axes.lines):
                assert list(line.get_xdata()) == [1, 4, 16]
                assert list(line.get_ydata()) == [batch * 10.0**power for batch in (1, 4, 16)]

    @pytest.mark.parametrize("name", ["plot.svg", "plot.PNG"])
    def test_file(self, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Beside the figures, which are printed as without it; a second run replaces the first one's."""
        path = tmp_path / name
        path.write_text("old")
        assert run_app(["bench", "attention", *SMALL, "--batch", "1", "--batch", "3", "--plot", str(path)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 5
        if name.endswith("svg"):
            ElementTree.parse(path)
            drawn = path.read_text()
            assert all(
                f"<!-- {text} -->" in drawn for text in ("all rows", "slice, then multiply", "4 key/value heads")
            )
        else:
            Image.open(path).verify()

    @pytest.mark.usefixtures("_measured")
    def test_figures_are_not_lost_where_the_picture_cannot_be_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "plot.svg").mkdir()
        assert run_app(["bench", "attention", *SMALL, "--json", "--plot", str(tmp_path / "plot.svg")]) == 2
        captured = capsys.readouterr()
        assert "cannot be written (Is a directory)" in captured.err
        assert len(json.loads(captured.out)["cases"]) == 6


def test_plot_without_matplotlib() -> None:
    """Refused at once, in one line."""
    program = (
        "import sys; sys.modules['matplotlib'] = None; from avl_edge.cli import run_app;"
        "sys.exit(run_app(['bench', 'attention', '--plot', 'plot.svg']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "avl-edge: --plot needs matplotlib: pip install 'avl-edge[eval]'\n"
