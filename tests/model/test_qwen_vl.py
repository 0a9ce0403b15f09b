"""Qwen-VL of 2023, which transformers does not have: held to numbers that its public code made (`tools.qwen_vl_vectors`
wrote them, with the command, the revision and the versions)."""

from __future__ import annotations

import base64
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from avl_edge import BadModel, Options, Runtime
from avl_edge.model.known import shape_of_checkpoint
from avl_edge.model.prompt.tiktoken_file import read_tiktoken
from tests import ROOT
from tests.equipment.qwen_vl_small import (
    CONFIG,
    PATTERN,
    PROMPTS,
    picture,
    picture_values,
    prompt_ids,
    ranks,
    write_checkpoint,
)
from tests.equipment.recorder import Recorder
from tests.equipment.small_tokenizers import byte_level

VECTORS = ROOT / "tests" / "equipment" / "qwen_vl.npz"


@pytest.fixture(scope="module")
def vectors() -> Any:
    return np.load(VECTORS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, vectors: Any) -> Path:
    shapes = json.loads(str(vectors["made"]))["shapes"]
    return write_checkpoint(tmp_path_factory.mktemp("qwen_vl"), shapes)


@pytest.mark.parametrize("name", PROMPTS)
def test_all_is_what_the_public_code_makes_of_it(directory: Path, vectors: Any, name: str) -> None:
    expected, logits = vectors[f"{name} tokens"], torch.from_numpy(vectors[f"{name} logits"])
    runtime = Runtime.load(directory, threaded=False)
    record = Recorder(runtime)
    seeds, question = PROMPTS[name]
    request = runtime.prepare(
        [picture(seed) for seed in seeds], question, Options("full", max_new_tokens=len(expected))
    )
    assert list(request.prompt.token_ids) == prompt_ids(name)
    shown = request.prompt.pixel_values.pictures if request.prompt.pixel_values else ()
    for ours, seed in zip(shown, seeds, strict=True):
        assert np.abs(ours.values - picture_values(seed)).max() <= 1e-6
    tokens = runtime.submit(request).result().token_ids
    assert list(tokens) == expected.tolist()
    assert (torch.stack(record.logits) - logits).abs().max() <= 2e-4


# --- vocabularies in tiktoken's form ---


def _trained() -> dict[bytes, int]:
    """Tokens of a byte-level BPE that was trained on English text, by rank."""
    model = json.loads(byte_level().to_str())["model"]
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in plain]
    of_character = {chr(each): each for each in plain} | {chr(256 + at): each for at, each in enumerate(others)}
    return {bytes(map(of_character.__getitem__, token)): rank for token, rank in model["vocab"].items()}


def _written(directory: Path, content: dict[bytes, int]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in content.items()]
    (directory / "qwen.tiktoken").write_text("".join(lines))
    return directory


@pytest.mark.parametrize("content", [ranks, _trained])
def test_a_vocabulary_is_read_as_tiktoken_reads_it(tmp_path: Path, content: Callable[[], dict[bytes, int]]) -> None:
    found = content()
    theirs = tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=found, special_tokens={})
    ours = read_tiktoken(_written(tmp_path, found), "qwen.tiktoken", PATTERN, ("<|endoftext|>",))
    assert ours is not None
    assert ours.token_to_id("<|endoftext|>") == len(found)

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=40) | st.text(" pictureshanwos'\n1", max_size=40))
    def check(text: str) -> None:
        ids = theirs.encode(unicodedata.normalize("NFC", text), disallowed_special=())
        assert ours.encode(text).ids == ids
        assert ours.decode(ids) == theirs.decode(ids)

    check()


def test_a_broken_vocabulary_is_a_bad_model(tmp_path: Path, directory: Path) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    lines = (copy / "qwen.tiktoken").read_text().splitlines(keepends=True)
    for content in ("nothing", "".join(lines[1:]), "".join(lines[:-2] + lines[-1:]), "!!!! 0\n"):
        (copy / "qwen.tiktoken").write_text(content)
        with pytest.raises(BadModel, match=r"qwen\.tiktoken is broken"):
            Runtime.open(copy)
    (copy / "qwen.tiktoken").unlink()
    with pytest.raises(BadModel, match=r"tokenizer\.json is missing"):
        Runtime.open(copy)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"no_bias": False}, "no_bias False is not supported: it must be True"),
        ({"kv_channels": 16}, "kv_channels times num_attention_heads must be hidden_size"),
        ({"visual": {**CONFIG["visual"], "output_dim": 256}}, "output_dim 256 is not hidden_size, 128"),
        ({"visual": {**CONFIG["visual"], "n_queries": 64}}, "n_queries 64 is not supported: it is 256"),
        ({"visual": None}, "has no visual"),
    ],
)
def test_what_is_not_served_is_refused_in_a_line(
    tmp_path: Path, directory: Path, changes: dict[str, Any], reason: str
) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(BadModel, match=reason):
        Runtime.open(copy)


def test_it_is_counted_without_weights(directory: Path) -> None:
    shape = shape_of_checkpoint(directory, "small")
    assert shape.picture(1280, 960).tokens == 256
    stored = load_file(directory / "model.safetensors")
    assert shape.parameters == sum(each.numel() for each in stored.values())
