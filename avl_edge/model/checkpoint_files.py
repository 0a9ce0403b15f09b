"""The files of a checkpoint's weights: which tensor is in which, under which canonical name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import BadModel, quoted, refusing, shortened
from ..files import is_lfs_pointer, lfs_pointer, read_json

# transformers wrote these prefixes at different times; the longer ones come first.
_PREFIXES = (
    ("model.vision_tower.vision_model.", "vision."),
    ("model.vision_tower.", "vision."),
    ("vision_tower.vision_model.", "vision."),
    ("vision_tower.", "vision."),
    ("model.multi_modal_projector.", "projector."),
    ("multi_modal_projector.", "projector."),
    ("language_model.lm_head.", "head."),
    ("lm_head.", "head."),
    ("language_model.model.", "text."),
    ("model.language_model.", "text."),
)
_MOST_HEADER_BYTES = 16 * 2**20


class _Source(NamedTuple):
    """Where a tensor is: its name in the file, and the file."""

    name: str
    path: Path


class Mapped(NamedTuple):
    """A tensor in the mapping of its file, and its name there."""

    name: str
    tensor: Tensor


def _sources(directory: Path, prefixes: Mapping[str, str]) -> dict[str, _Source]:
    """By canonical name; :class:`BadModel` where two tensors have one, since either may be the right one."""
    found: dict[str, _Source] = {}
    for source in _tensor_files(directory):
        name = _canonical(source.name, prefixes)
        if name in found:
            raise BadModel(
                f"{directory} has two tensors for {name}: {quoted(found[name].name)} and {quoted(source.name)}; copy "
                f"the checkpoint again"
            )
        found[name] = source
    return found


def _tensor_files(directory: Path) -> Iterator[_Source]:
    """Every tensor, from the index or the one file."""
    index = directory / "model.safetensors.index.json"
    document = read_json(index)
    if document is None:
        path = directory / "model.safetensors"
        if not path.exists():
            raise BadModel(_no_weights(directory))
        names: list[str] = _open(path).keys()
        yield from (_Source(name, path) for name in names)
        return
    files = document.get("weight_map")
    if not isinstance(files, dict):
        raise BadModel(f"{index} has no weight_map")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise BadModel(f"{index} places {quoted(name)} outside of its directory ({quoted(file)})")
        yield _Source(name, directory / file)


def _no_weights(directory: Path) -> str:
    missing = f"{directory} has no model.safetensors and no model.safetensors.index.json"
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        return f"{missing}, but pickled weights, which are never read: convert them to safetensors"
    if any(directory.glob("*.gguf")):
        return f"{directory} holds GGUF files, which are llama.cpp's: give the model's safetensors"
    return missing


def map_tensors(directory: Path, prefixes: Mapping[str, str]) -> dict[str, Mapped]:
    """Every tensor of the checkpoint in ``directory``, by canonical name; nothing is read but the files' headers.

    What an index names and its file has not is left out: whoever needs it says so.
    """
    sources = _sources(directory, prefixes)
    files = {path: _open(path) for path in dict.fromkeys(source.path for source in sources.values())}
    held = {path: frozenset(file.keys()) for path, file in files.items()}
    return {
        name: Mapped(source.name, _tensor(files[source.path], source))
        for name, source in sources.items()
        if source.name in held[source.path]
    }


def _tensor(file: safe_open, source: _Source) -> Tensor:
    with refusing(lambda reason: BadModel(f"{source.path} cannot give {shortened(source.name, 60)}: {reason}")):
        tensor: Tensor = file.get_tensor(source.name)
    return tensor


def _open(path: Path) -> safe_open:
    """An open file. What its header says of shapes and places is checked by safetensors: none may overlap, leave a gap
    or end beyond the file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except (OSError, ValueError):
        raise _missing(path) from None
    if is_lfs_pointer(path):
        raise lfs_pointer(path)
    if length > _MOST_HEADER_BYTES:
        raise BadModel(f"{path} is damaged: its header would have {length} bytes; copy the checkpoint again")
    with refusing(lambda reason: BadModel(f"{path} is damaged or cut off; copy the checkpoint again ({reason})")):
        return safe_open(path, framework="pt")


def stored_bytes(directory: Path) -> int:
    """What the checkpoint's files of weights weigh; :class:`BadModel` where one is missing."""
    return sum(_size(path) for path in {source.path for source in _sources(directory, {}).values()})


def _size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError:
        raise _missing(path) from None
    if is_lfs_pointer(path):
        raise lfs_pointer(path)
    return size


def _missing(path: Path) -> BadModel:
    return BadModel(f"{path} is missing or may not be read: the checkpoint's index names it")


def _canonical(name: str, prefixes: Mapping[str, str]) -> str:
    for prefix, canonical in (*prefixes.items(), *_PREFIXES):
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
    return name


def read_dtype(directory: Path, name: str, prefixes: Mapping[str, str] = MappingProxyType({})) -> torch.dtype:
    """That of the tensor of this canonical name; :class:`BadModel`, with the names that are there, where there is
    none."""
    sources = _sources(directory, prefixes)
    source = sources.get(name)
    if source is None:
        raise BadModel(_unknown_layout(directory, name, [each.name for each in sources.values()], prefixes))
    return _tensor(_open(source.path), source).dtype


def _unknown_layout(directory: Path, name: str, found: list[str], prefixes: Mapping[str, str]) -> str:
    first = ", ".join(f"'{shortened(each, 120)}'" for each in found[:3]) or "none"
    part = name.partition(".")[0] + "."
    begins = [prefix for prefix, canonical in (*_PREFIXES, *prefixes.items()) if canonical.startswith(part)]
    lacks = f"{directory} has no {name} under any name that is known (it may begin with {', '.join(begins)}); its first"
    if any("mm_projector" in each for each in found):
        return f"{lacks} tensors are {first}: this is LLaVA's original layout, give the one for transformers (-hf)"
    return f"{lacks} tensors are {first}: does config.json belong to these files?"
