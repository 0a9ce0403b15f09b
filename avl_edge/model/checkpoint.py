"""A Hugging Face checkpoint directory: its weights, memory-mapped, by canonical name.

Canonical names: ``text.*`` (embed_tokens, layers.N.*, norm), ``head.weight``, ``vision.*``, ``projector.*``.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..config import Progress, read_json
from ..errors import BadModel, quoted, refusing, shortened

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
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_HEADER_BYTES = 16 * 2**20


class _Source(NamedTuple):
    """Where a tensor is: its name in the file, and the file."""

    name: str
    path: Path


class Weights:
    """Tensors by canonical name, in the dtype of the embedding (``dtype``).

    :meth:`take` checks shapes, so that a wrong file fails at load, by name; what nobody takes does not matter.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.dtype = torch.float32
        if "text.embed_tokens.weight" in tensors:
            self.dtype = tensors["text.embed_tokens.weight"].dtype

    def renamed(self, names: Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]) -> Weights:
        """The same by other names; one tensor may be several."""
        return Weights(dict(pair for name, tensor in self._tensors.items() for pair in names(name, tensor)))

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor ``name``; :class:`BadModel` when it is not there or not of ``shape``."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise BadModel(f"the checkpoint has no weights for {name}: is it complete, and does config.json match it?")
        if shape and tuple(tensor.shape) != shape:
            raise BadModel(f"{name} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}")
        if tensor.dtype not in _DTYPES:
            raise BadModel(f"{name} is stored as {tensor.dtype}: only float checkpoints are supported")
        return tensor.to(self.dtype)

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of that name."""
        return name in self._tensors

    def deny(self, name: str) -> None:
        """:class:`BadModel` when the file has ``name`` though config.json says that there is none."""
        if name in self._tensors:
            raise BadModel(f"the checkpoint has {name}, which config.json says the model does not: they do not match")


def load_weights(
    directory: Path, progress: Progress | None = None, prefixes: Mapping[str, str] = MappingProxyType({})
) -> Weights:
    """Memory-map all safetensors of ``directory``; read them once, so that the wait is here and not in an answer.
    ``prefixes``: those of the model's family (:attr:`avl_edge.model.spec.ModelSpec.prefixes`)."""
    sources = _sources(directory, prefixes)
    tensors: dict[str, Tensor] = {}
    for done, (name, tensor) in enumerate(_read(sources), start=1):
        tensors[name] = tensor
        _page_in(tensor)
        if progress:
            progress(done, len(sources))
    return Weights(tensors)


def _page_in(tensor: Tensor) -> None:
    """Touch every page of a mapped tensor."""
    if tensor.is_contiguous():
        tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


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
    return missing


def _read(sources: Mapping[str, _Source]) -> Iterator[tuple[str, Tensor]]:
    files = {path: _open(path) for path in dict.fromkeys(source.path for source in sources.values())}
    for canonical, source in sources.items():
        yield canonical, _tensor(files[source.path], source)


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
    if length > _MOST_HEADER_BYTES:
        raise BadModel(f"{path} is damaged: its header would have {length} bytes; copy the checkpoint again")
    with refusing(lambda reason: BadModel(f"{path} is damaged or cut off; copy the checkpoint again ({reason})")):
        return safe_open(path, framework="pt")


def stored_bytes(directory: Path) -> int:
    """What the checkpoint's files of weights weigh; :class:`BadModel` where one is missing."""
    return sum(_size(path) for path in {source.path for source in _sources(directory, {}).values()})


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        raise _missing(path) from None


def _missing(path: Path) -> BadModel:
    return BadModel(f"{path} is missing or may not be read: the checkpoint's index names it")


def _canonical(name: str, prefixes: Mapping[str, str]) -> str:
    for prefix, canonical in (*prefixes.items(), *_PREFIXES):
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
    return name


def stored_dtype(directory: Path, prefixes: Mapping[str, str] = MappingProxyType({})) -> torch.dtype:
    """The dtype that the model will compute in, from the file headers alone."""
    source = _sources(directory, prefixes).get("text.embed_tokens.weight")
    if source is None:
        raise BadModel(f"{directory} has no text.embed_tokens.weight: its safetensors do not hold the model's decoder")
    return _tensor(_open(source.path), source).dtype
