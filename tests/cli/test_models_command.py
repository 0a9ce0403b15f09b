"""`avl-edge models`: the models that plan knows by name, by their published sizes."""

from __future__ import annotations

import json

import pytest

from avl_edge.cli import run_app
from avl_edge.model.known import KNOWN

# From the models' cards and config.json files: parameters as the hub counts them, K and V of every layer in 16 bits,
# and the image tokens of 1280x960 as the processors of the models cut it.
PUBLISHED = {
    "llava-1.5-7b": (7_063_427_072, 2 * 32 * 32 * 128 * 2, 576),
    "llava-1.6-mistral-7b": (7_566_747_648, 2 * 32 * 8 * 128 * 2, 2340),
    "qwen2-vl-2b": (2_208_985_600, 2 * 28 * 2 * 128 * 2, 46 * 34),
    "qwen2.5-vl-7b": (8_292_166_656, 2 * 28 * 4 * 128 * 2, 46 * 34),
}


def test_it_lists_what_is_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["models", "--json"]) == 0
    captured = capsys.readouterr()
    assert (captured.err, captured.out.count("\n")) == ("", 1)
    document = json.loads(captured.out)
    assert document["picture"] == [1280, 960]
    rows = {row["name"]: row for row in document["models"]}
    assert list(rows) == list(KNOWN)
    for name, (parameters, kv_bytes, image_tokens) in PUBLISHED.items():
        assert rows[name] == {
            "name": name,
            "parameters": parameters,
            "weight_bytes": 2 * parameters,
            "kv_bytes_per_token": kv_bytes,
            "image_tokens": image_tokens,
        }


def test_the_table_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["of", "1280x960"]
    assert [line.split()[0] for line in lines[1:]] == list(KNOWN)
    assert lines[1].split() == ["llava-1.5-7b", "7.06", "B", "14.1", "GB", "524.3", "kB", "576"]
    assert max(map(len, lines)) <= 80
