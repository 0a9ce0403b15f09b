"""Checkpoints as they are found on disks: pointers in place of files, indexes that name too much, heads that a config
forgets, layouts of other programs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from avl_edge import BadModel, Options, Runtime
from avl_edge.model.checkpoint_files import stored_bytes
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.recorder import Recorder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 14583660\n"


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("mistral-gqa"), tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "processor_config.json"])
def test_pointers_of_git_lfs_are_named(copy: Path, file: str) -> None:
    (copy / file).write_text(POINTER)
    with pytest.raises(BadModel, match=rf"{file.replace('.', '[.]')} is a pointer of Git LFS .* 'git lfs pull'"):
        Runtime.open(copy)


def test_one_shard_of_several_as_a_pointer_is_named_before_any_is_loaded(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoint("mistral-gqa", max_shard_size="100KB"), tmp_path / "model"))
    last = sorted(copy.glob("*.safetensors"))[-1]
    last.write_text(POINTER)
    with pytest.raises(BadModel, match=rf"{last.name} is a pointer of Git LFS"):
        stored_bytes(copy)
    with pytest.raises(BadModel, match=rf"{last.name} is a pointer of Git LFS"):
        Runtime.load(copy)


def test_an_index_may_name_what_nobody_needs_and_no_more(checkpoint: Checkpoints, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint("mistral-gqa", max_shard_size="100KB"), tmp_path / "model"))
    index = copy / "model.safetensors.index.json"
    shards = sorted({path.name for path in copy.glob("*.safetensors")})
    needless = {f"vision_tower.encoder.layers.{i}.rotary.inv_freq": shards[0] for i in range(3)}
    edit(index, lambda document: document["weight_map"].update(needless))
    Runtime.load(copy).close()
    norm = "language_model.model.norm.weight"
    wrong = next(name for name in shards if name != json.loads(index.read_text())["weight_map"][norm])
    edit(index, lambda document: document["weight_map"].update({norm: wrong}))
    with pytest.raises(BadModel, match=r"no weights for text\.norm\.weight"):
        Runtime.load(copy)


def logits(directory: Path) -> torch.Tensor:
    with Runtime.load(directory) as runtime:
        record = Recorder(runtime)
        runtime.generate([random_image(1, 60)], "What is shown?", Options(max_new_tokens=3)).result()
        return torch.stack(record.logits)


@pytest.mark.parametrize(("top", "inner"), [(False, True), (True, False), (True, True)])
def test_a_head_of_its_own_is_used_whatever_the_config_says(copy: Path, top: bool, inner: bool) -> None:
    """The checkpoint's head is not its embedding; what transformers loads of it without a word about ties is right."""
    expected = logits(copy)
    edit(copy / "config.json", lambda c: c.update(tie_word_embeddings=top))
    edit(copy / "config.json", lambda c: c["text_config"].update(tie_word_embeddings=inner))
    torch.testing.assert_close(logits(copy), expected)
    tensors = load_file(copy / "model.safetensors")
    assert not torch.equal(
        tensors["language_model.lm_head.weight"], tensors["language_model.model.embed_tokens.weight"]
    )


def renamed(copy: Path, *names: tuple[str, str]) -> None:
    file = copy / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        old, new = next((pair for pair in names if name.startswith(pair[0])), ("", ""))
        tensors[new + name[len(old) :]] = tensor.clone()
    save_file(tensors, file)


def test_other_layouts_are_named_by_what_is_in_them(copy: Path) -> None:
    originals = Path(shutil.copytree(copy, copy.parent / "original"))
    renamed(originals, ("language_model.model.", "model."), ("multi_modal_projector.", "model.mm_projector."))
    with pytest.raises(BadModel, match=r"its first tensors are .*LLaVA's original layout.*\(-hf\)") as caught:
        Runtime.open(originals)
    assert "language_model.model." in str(caught.value)
    renamed(copy, ("language_model.", "language_model.language_model.language_model."))
    with pytest.raises(BadModel, match=r"'language_model\.language_model\.language_model\.") as caught:
        Runtime.open(copy)
    assert "does config.json belong to these files?" in str(caught.value)


def test_a_tower_under_another_name_is_told_with_what_is_there(copy: Path) -> None:
    renamed(copy, ("vision_tower.", "visual_tower."))
    with pytest.raises(BadModel, match=r"no weights for vision\..*, its first tensors are '"):
        Runtime.load(copy)
