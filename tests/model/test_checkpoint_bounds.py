"""Checkpoints that lie about their sizes, or say two things at once: refused from their small files and headers."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from avl_edge import BadModel, Runtime
from avl_edge.model.checkpoint import load_weights, stored_dtype
from avl_edge.model.families import read_spec
from avl_edge.model.known import shape_of_checkpoint
from tests.conftest import Checkpoints
from tests.equipment.processes import PEAK_MEMORY, run_python


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint of its own to damage."""
    return Path(shutil.copytree(checkpoint("mistral-gqa"), tmp_path / "model"))


def _set(path: Path, section: str | None, **values: Any) -> None:
    document = json.loads(path.read_text())
    (document[section] if section else document).update(values)
    path.write_text(json.dumps(document))


def test_two_tensors_of_one_canonical_name_are_refused(copy: Path) -> None:
    """Either may be the right one: the last in the file would have won in silence."""
    file = copy / "model.safetensors"
    tensors = load_file(file)
    mine, other = "language_model.model.norm.weight", "model.language_model.norm.weight"
    save_file(tensors | {other: tensors[mine] * 2}, file)
    for refused in (load_weights, stored_dtype, Runtime.load):
        with pytest.raises(BadModel, match=r"two tensors for text\.norm\.weight: ") as caught:
            refused(copy)
        assert repr(mine) in str(caught.value)
        assert repr(other) in str(caught.value)


def test_an_index_that_names_a_tensor_twice_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint("mistral-gqa", max_shard_size="100KB"), tmp_path / "model"))
    index = copy / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["lm_head.weight"] = document["weight_map"]["language_model.lm_head.weight"]
    index.write_text(json.dumps(document))
    with pytest.raises(BadModel, match=r"two tensors for head\.weight"):
        Runtime.open(copy)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b", 3])
def test_an_index_stays_in_its_directory(checkpoint: Checkpoints, tmp_path: Path, place: Any) -> None:
    copy = Path(shutil.copytree(checkpoint("mistral-gqa", max_shard_size="100KB"), tmp_path / "model"))
    index = copy / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] = dict.fromkeys(document["weight_map"], place)
    index.write_text(json.dumps(document))
    with pytest.raises(BadModel) as caught:
        load_weights(copy)
    assert "\n" not in str(caught.value)


def _header(entries: dict[str, Any] | bytes, length: int | None = None) -> bytes:
    content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + bytes(64)


def _tensor(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "length beyond any file": _header({}, 2**63),
    "length beyond this file": _header({}, 10_000_000),
    "length of a large file": _header({}, 90_000_000),
    "overlapping": _header({"a": _tensor(0, 32, 8), "b": _tensor(16, 48, 8)}),
    "negative": _header({"a": _tensor(-1, 31, 8)}),
    "backwards": _header({"a": _tensor(64, 0, 8)}),
    "a gap": _header({"a": _tensor(32, 64, 8)}),
    "beyond the end": _header({"a": _tensor(0, 2**42, 2**40)}),
    "a product that overflows": _header({"a": _tensor(0, 64, 2**62, 2**62)}),
    "deep": _header(b'{"a":' * 100_000),
    "no JSON": _header(b"\xff\xfe"),
    "empty": b"",
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_refused(copy: Path, case: str) -> None:
    (copy / "model.safetensors").write_bytes(HEADERS[case])
    with pytest.raises(BadModel, match=r"model\.safetensors is damaged") as caught:
        load_weights(copy)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_header_of_a_hundred_megabytes_is_not_read(copy: Path) -> None:
    """The library takes headers up to 100 MB, of which it makes several times as much."""
    with (copy / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000) + b'{"a":[')
        file.truncate(99_000_008)
    program = f"""
from pathlib import Path
from avl_edge.errors import BadModel
from avl_edge.model.checkpoint import load_weights

before = peak_memory()
try:
    load_weights(Path({str(copy)!r}))
except BadModel as error:
    assert "its header would have 99000000 bytes" in str(error)
    print(peak_memory() - before)
"""
    assert int(run_python(PEAK_MEMORY + program)) < 20_000  # kB


ABSURD = [
    ("text_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and no model has more than 1024"),
    ("text_config", {"num_hidden_layers": 10**4000}, "num_hidden_layers is 1000.*, and no model has more than 1024"),
    ("text_config", {"vocab_size": 2**40}, "vocab_size is"),
    ("text_config", {"hidden_size": 2**40}, "hidden_size is"),
    ("text_config", {"max_position_embeddings": 2**40}, "max_position_embeddings is"),
    ("text_config", {"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number, not inf"),
    ("text_config", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, not nan"),
    ("text_config", {"rms_norm_eps": True}, "rms_norm_eps must be a positive number, not True"),
    ("text_config", {"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
    ("text_config", {"hidden_act": ["x" * 10**6]}, "hidden_act must be a string"),
    ("vision_config", {"image_size": 10**6}, "image_size is 1000000, and no model has more than 4096"),
    ("vision_config", {"patch_size": 4000}, "patch_size 4000 is larger than image_size"),
    (None, {"image_token_index": 2**70}, "image_token_index is"),
    (None, {"image_token_id": 2**70}, "image_token_id is"),
    (None, {"vision_feature_layer": [7] * 10**5}, "vision_feature_layer .* is outside a tower"),
    (None, {"model_type": "x" * 10**6}, "it must be one of llava"),
]


@pytest.mark.parametrize(("section", "values", "reason"), ABSURD, ids=[reason[:30] for _, _, reason in ABSURD])
def test_absurd_sizes_are_refused(copy: Path, section: str | None, values: dict[str, Any], reason: str) -> None:
    _set(copy / "config.json", section, **values)
    with pytest.raises(BadModel, match=reason) as caught:
        read_spec(copy)
    assert len(str(caught.value)) < 400


def test_a_dtype_and_a_rope_that_are_none(copy: Path) -> None:
    _set(copy / "config.json", None, dtype=["float32"])
    with pytest.raises(BadModel, match=r"dtype \['float32'\] is none of"):
        shape_of_checkpoint(copy, "model")
    _set(copy / "config.json", None, dtype="float32")
    _set(copy / "config.json", "text_config", rope_parameters={"rope_theta": 10**400, "rope_type": "default"})
    with pytest.raises(BadModel, match="lacks a parameter or has a wrong one"):
        Runtime.load(copy)
