"""Prompts and models that the processor refuses, with its message."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from avl_edge.errors import BadImage, BadInput, BadModel
from tests.equipment.small_processors import (
    IMAGE_SETTINGS,
    KINDS,
    VOCAB_SIZE,
    image_id,
    model_directory,
    open_processor,
    pictures,
    write,
)
from tests.equipment.small_tokenizers import llama


@pytest.mark.parametrize("kind", KINDS)
def test_bad_prompts_are_refused(tmp_path: Path, kind: str) -> None:
    processor = open_processor(model_directory(tmp_path, kind), kind)
    for prompt, reason in {
        "": "the prompt is empty",
        " \n\t": "the prompt is empty",
        "broken \udc80": "not valid Unicode",
    }.items():
        with pytest.raises(BadInput, match=reason):
            processor(pictures(1), prompt)
    with pytest.raises(BadInput, match="the system text is not valid Unicode"):
        processor(pictures(1), "What is this?", "broken \udc80")
    with pytest.raises(BadImage):
        processor([b"no picture"], "What is this?")


def test_missing_and_broken_files_are_a_bad_model(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="is not a directory"):
        open_processor(tmp_path / "none")
    for name, reason in {
        "tokenizer.json": r"tokenizer\.json is missing",
        "preprocessor_config.json": r"has no preprocessor_config\.json",
    }.items():
        path = model_directory(tmp_path)
        (path / name).unlink()
        with pytest.raises(BadModel, match=reason):
            open_processor(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "preprocessor_config.json"):
        for content in ("{", "[1]", "\ufeff{"):
            path = model_directory(tmp_path)
            write(path / name, content)
            with pytest.raises(BadModel, match=name.replace(".", r"\.")):
                open_processor(path)
    path = model_directory(tmp_path)
    write(path / "tokenizer.json", Tokenizer.from_str('{"model":{"type":"BPE","vocab":{},"merges":[]}}').to_str())
    with pytest.raises(BadModel, match="has no tokens"):
        open_processor(path)


def test_mismatches_are_a_bad_model_with_the_numbers(tmp_path: Path) -> None:
    path = model_directory(tmp_path)
    highest = llama().get_vocab_size() - 1
    with pytest.raises(BadModel, match=f"token ids up to {highest}, but the model's vocabulary has 300 entries"):
        open_processor(path, vocab_size=300)
    with pytest.raises(BadModel, match=f"takes token 7 as the image .* has '<0x04>' there, .* as token {image_id()}"):
        open_processor(path, image_token_id=7)
    with pytest.raises(BadModel, match="takes token -200 as the image placeholder"):
        open_processor(path, image_token_id=-200)
    with pytest.raises(BadModel, match="at least 1 token, not 0"):
        open_processor(path, tokens_per_image=0)
    with pytest.raises(BadModel, match=r"pictures of 56 x 56 pixels .* takes 336 x 336"):
        open_processor(path, image_size=336)
    write(path / "preprocessor_config.json", IMAGE_SETTINGS | {"do_center_crop": False})
    with pytest.raises(BadModel, match="gives every picture another size"):
        open_processor(path)


def test_eos_token_ids_outside_of_the_vocabulary_are_refused(tmp_path: Path) -> None:
    path = model_directory(tmp_path)
    for value in (VOCAB_SIZE, -1, "2", [2, True]):
        write(path / "generation_config.json", {"eos_token_id": value})
        with pytest.raises(BadModel, match="is no token id of a vocabulary of 420"):
            open_processor(path)
