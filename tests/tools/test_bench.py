"""The benchmark of a decode step: a short run gives what it documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.equipment.decode_attention import needs_native


def test_bench_decode(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    options = ["--layers", "1", "--steps", "6", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "tools.bench_decode", *options], cwd=ROOT, check=True, timeout=300)
    document = json.loads(out.read_text())
    assert {"command", "date", "machine", "model"} <= set(document)
    assert [(case["image_rows"], case["method"]) for case in document["cases"]] == [
        (rows, method) for rows in (576, 2340) for method in ("full", "avl")
    ]
    for full, avl in zip(document["cases"][::2], document["cases"][1::2], strict=True):
        # Six steps after 35 + 36 text tokens; a row is 32 heads of 128, K and V, in bfloat16.
        assert full["rows_read_per_step"] == full["image_rows"] + 71 + 3.5
        # Every third step reads the stored 45 %, the others the core's 30 %; text is what A-VL keeps of it.
        image = full["image_rows"]
        read = (2 * (image * 45 // 100) + 4 * (image * 30 // 100)) / 6
        assert read + 35 < avl["rows_read_per_step"] < read + 71 + 3.5
        for case in (full, avl):
            assert case["kv_bytes_read_per_step"] == pytest.approx(case["rows_read_per_step"] * 2 * 32 * 128 * 2, 1e-3)
            assert 0 < case["attention_ms_per_token"] < case["ms_per_token"]


def test_bench_host() -> None:
    command = [sys.executable, "-m", "tools.bench_host", "--rows", "60", "--steps", "6"]
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=300, capture_output=True, text=True)
    result = json.loads(done.stdout)
    cases = result["cases"]
    assert [(case["batch"], case["method"], case["formats"]["secondary"]) for case in cases] == [
        (batch, *case) for batch in (1, 16) for case in (("full", "exact"), ("avl", "exact"), ("avl", "int4"))
    ]
    for one, many in zip(cases[:3], cases[3:], strict=True):
        assert one.keys() == many.keys()
        for kind in {"ordinary", "refresh"} & one.keys():
            assert 0 < one[kind]["before_ms"] < many[kind]["before_ms"]
            assert 0 < one[kind]["settle_ms"] < many[kind]["settle_ms"]
    assert ["refresh" in case for case in cases] == [False, True, True] * 2
    assert result["close"]["ms"] > 0


@needs_native
def test_bench_step() -> None:
    command = [sys.executable, "-m", "tools.bench_step", "--steps", "3", "--megabytes", "4"]
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=300, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert {"command", "date", "machine", "steps", "products"} == set(result)
    assert [(each["threads"], each["method"]) for each in result["steps"]] == [
        (threads, method) for threads in (1, 2) for method in ("full", "avl", "distinct")
    ]
    for step in result["steps"]:
        assert 0 < step["host_ms"] < step["native_ms"]
        assert step["native_to_torch"] == pytest.approx(step["native_ms"] / step["torch_ms"], abs=0.01)
    for product in result["products"]:
        assert all(product[name] > 0 for name in ("sum_gb_per_s", "bfloat16", "int8", "int4"))


def test_a_figure_is_kept_with_where_it_comes_from(tmp_path: Path) -> None:
    out = tmp_path / "new" / "figure.json"
    command = [sys.executable, "-m", "tools.record", str(out), "--", "python", "-c"]
    subprocess.run([*command, "print('{\"answer\": 42}')"], cwd=ROOT, check=True, timeout=60)
    document = json.loads(out.read_text())
    assert document["result"] == {"answer": 42}
    assert document["command"].startswith("python -c ")
    assert {"cpu", "python", "torch"} <= set(document["machine"])
    before = out.read_text()
    failed = subprocess.run([*command, "import sys; sys.exit(3)"], cwd=ROOT, check=False, timeout=60)
    assert failed.returncode == 3
    assert out.read_text() == before
