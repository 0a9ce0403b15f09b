"""Profiles as files: what is written and read back, what is refused and by which name."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.errors import MESSAGE_LENGTH
from avl_edge.machine import profile
from avl_edge.machine.profile import ANY, BadProfile, Figure
from tests.equipment.profiles import ORIN, SHIPPED, TEXT, measured_profile


def test_a_file_reads_back_as_it_was(tmp_path: Path) -> None:
    for each in (*SHIPPED.values(), measured_profile()):
        profile.save(each, tmp_path / "profiles" / "p.yaml")
        assert profile.read(tmp_path / "profiles" / "p.yaml") == each
    assert os.listdir(tmp_path / "profiles") == ["p.yaml"]


_floats = st.floats(0, 1e6, allow_nan=False).map(lambda value: float(f"{value:.6g}"))


@settings(max_examples=40, deadline=None)
@given(value=_floats, basis=st.sampled_from(["measured", "derived"]), origin=st.text(max_size=40))
def test_any_figure_reads_back(value: float, basis: Any, origin: str) -> None:
    costs = replace(ORIN.models[ANY].costs, decode_us_per_layer=Figure(value, basis, origin))
    changed = replace(ORIN, models={ANY: replace(ORIN.models[ANY], costs=costs)})
    assert profile.loads(profile.dumps(changed), "text") == changed


@pytest.mark.parametrize("text", [TEXT, profile.dumps(measured_profile())], ids=["shipped", "measured"])
def test_a_file_cut_anywhere_is_refused(text: str) -> None:
    for end in range(0, len(text), 37):
        with pytest.raises(BadProfile):
            profile.loads(text[:end], "half.yaml")
    with pytest.raises(BadProfile, match="cut off"):
        profile.loads(text[: text.index("# end")], "half.yaml")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(TEXT)), st.integers(0, 40), st.text(max_size=12))
def test_damaged_files_are_refused_by_name_or_read(start: int, length: int, patch: str) -> None:
    try:
        profile.loads(TEXT[:start] + patch + TEXT[start + length :], "damaged.yaml")
    except BadProfile as error:
        assert "damaged.yaml" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        ("version: 1", "version: 2", "version 2.*reads version 1"),
        ("version: 1", "version: true", "version True"),
        ("name: agx-orin-64-30w", "nome: x", "unknown key 'nome': did you mean name"),
        ("reserve_bytes", "reserve_gigabytes", "unknown key 'reserve_gigabytes'.*reserve_bytes"),
        (r"\n *decode_ms_per_tflop: .*", "", "lacks decode_ms_per_tflop"),
        (r"total_bytes: {value: [\d.e+]+", "total_bytes: {value: 64", "total_bytes is 64, .*another unit"),
        (r"bandwidth_bytes_per_s: {value: [\d.e+]+", "bandwidth_bytes_per_s: {value: 156", "another unit"),
        (r"available_bytes: {value: [\d.e+]+", "available_bytes: {value: 9.0e+13", "more than the total"),
        (r"decode_us_per_layer: {value: 0.0", "decode_us_per_layer: {value: .nan", "finite"),
        (r"decode_us_per_layer: {value: 0.0", "decode_us_per_layer: {value: -3", "0 or more"),
        (r"decode_us_per_layer: {value: 0.0", "decode_us_per_layer: {value: 1e30", "another unit|must be a number"),
        (r"decode_us_per_layer: {value: 0.0", "decode_us_per_layer: {value: 3 ms", "must be a number"),
        (r"decode_us_per_layer: {value: 0.0", f"decode_us_per_layer: {{value: 1{'0' * 400}", "finite"),
        (r"samples: \[\]", "samples: [{phase: decode, label: x, ms: 0, runs: 1, amounts: {}}]", "a time of 0 ms"),
        (r"samples: \[\]", "samples: [{phase: decode, label: x, ms: 1, runs: 1, amounts: {beer: 1}}]", "beer"),
        (r"workspace_percent: {value: 100.0", "workspace_percent: {value: 0.5", "another unit"),
        ("basis: derived", "basis: guessed", "must be one of measured, derived, not 'guessed'"),
        ("kind: jetson", "kind: toaster", "must be one of jetson, linux"),
        ("  any:", "  all:", "lacks 'any'"),
        ("power_mode:", "name: twice\npower_mode:", "a key stands twice"),
        ("modules:", "modules: 3\n  module:", "must be a list|unknown key"),
        ("device:\n", "device: []\nspare:\n", "must be a mapping|unknown key"),
        ("name: agx", "name: !!python/object/apply:os.getcwd []\nx: agx", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(pattern: str, replacement: str, message: str) -> None:
    text, count = re.subn(pattern, replacement.replace("\\", ""), TEXT, count=1)
    assert count == 1
    with pytest.raises(BadProfile, match=rf"(?s)wrong\.yaml.*({message})"):
        profile.loads(text, "wrong.yaml")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "large.yaml").write_bytes(b"#" * (9 << 20))
    for name in ("binary", "empty", "folder", "large", "missing"):
        with pytest.raises(BadProfile, match=name):
            profile.read(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "p.yaml"
    profile.save(ORIN, path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(BadProfile, match="No space left"):
        profile.save(measured_profile(), path)
    assert path.read_text() == TEXT
    assert os.listdir(tmp_path) == ["p.yaml"]


def test_a_write_that_does_not_read_back_leaves_the_old_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    profile.save(ORIN, path)
    broken = replace(ORIN, memory=replace(ORIN.memory, total_bytes=Figure(1.0, "derived", "")))
    with pytest.raises(BadProfile):
        profile.save(broken, path)
    assert path.read_text() == TEXT


def test_references_are_refused() -> None:
    """334 bytes, which stand for 10^9 values; a message that quoted them had 15 MB."""
    levels = "\n".join(f"v{i}: &v{i} [{', '.join([f'*v{i - 1}'] * 10)}]" for i in range(1, 10))
    start = time.process_time()
    for text in (
        f"v0: &v0 x\n{levels}\nname: *v9\n# end of profile\n",
        "a: &a {<<: *a}\n# end of profile\n",
        "&a [*a]",
    ):
        with pytest.raises(
            BadProfile, match=r"bomb\.yaml is not valid YAML .*references \(\*\) are not supported"
        ) as no:
            profile.loads(text, "bomb.yaml")
        assert len(str(no.value)) < 300
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("version: 1", "version: " + "[" * 300 + "]" * 300),
        ("version: 1", "version: 0x" + "f" * 100_000),
        ("version: 1", "version: " + "[" * 100_000),
        ("name: agx-orin-64-30w", "name: [" + "long, " * 100_000 + "]"),
        ("name: agx-orin-64-30w", "? " + "x" * 1000 + "\n: 1"),
        ("kind: jetson", "kind: " + "x" * 100_000),
        ("version: 1", "version: 2026-99-99"),
    ],
)
def test_a_message_is_short_whatever_stands_in_the_file(pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, TEXT, count=1)
    assert count == 1
    with pytest.raises(BadProfile, match=r"wrong\.yaml") as no:
        profile.loads(text, "wrong.yaml")
    assert len(str(no.value)) <= MESSAGE_LENGTH
