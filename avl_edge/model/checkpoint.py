"""A Hugging Face checkpoint directory: its weights, memory-mapped, by canonical name.

Canonical names: ``text.*`` (embed_tokens, layers.N.*, norm), ``head.weight``, ``vision.*``, ``projector.*``.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import Progress, read_json
from ..errors import BadModel

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


class Weights:
    """Tensors by canonical name, in the dtype of the embedding (``dtype``).

    :meth:`take` checks shapes, so that a wrong file fails at load, by name; what nobody takes does not matter.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.dtype = torch.float32
        if "text.embed_tokens.weight" in tensors:
            self.dtype = tensors["text.embed_tokens.weight"].dtype

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

    def deny(self, name: str) -> None:
        """:class:`BadModel` when the file has ``name`` though config.json says that there is none."""
        if name in self._tensors:
            raise BadModel(f"the checkpoint has {name}, which config.json says the model does not: they do not match")


def load_weights(directory: Path, progress: Progress | None = None) -> Weights:
    """Memory-map all safetensors of ``directory``; read them once, so that the wait is here and not in an answer."""
    names = list(_tensor_files(directory))
    tensors: dict[str, Tensor] = {}
    for done, (name, tensor) in enumerate(_read(names), start=1):
        tensors[_canonical(name)] = tensor
        _page_in(tensor)
        if progress:
            progress(done, len(names))
    return Weights(tensors)


def _page_in(tensor: Tensor) -> None:
    """Touch every page of a mapped tensor."""
    if tensor.is_contiguous():
        tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def _tensor_files(directory: Path) -> Iterator[tuple[str, Path]]:
    """(tensor name, file) of every tensor, from the index or the one file."""
    index = directory / "model.safetensors.index.json"
    document = read_json(index)
    if document is None:
        path = directory / "model.safetensors"
        if not path.exists():
            raise BadModel(f"{directory} has no model.safetensors and no model.safetensors.index.json")
        names: list[str] = _open(path).keys()
        yield from ((name, path) for name in names)
        return
    files = document.get("weight_map")
    if not isinstance(files, dict):
        raise BadModel(f"{index} has no weight_map")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise BadModel(f"{index} places {name} outside of its directory ({file!r})")
        yield name, directory / file


def _read(names: list[tuple[str, Path]]) -> Iterator[tuple[str, Tensor]]:
    files = {path: _open(path) for path in dict.fromkeys(path for _, path in names)}
    for name, path in names:
        try:
            yield name, files[path].get_tensor(name)
        except SafetensorError as error:
            raise BadModel(f"{path} cannot give {name}: {error}") from None


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise BadModel(f"{path} is missing or may not be read: the checkpoint's index names it") from None
    except (SafetensorError, OSError) as error:
        raise BadModel(f"{path} is damaged or cut off; copy the checkpoint again ({error})") from None


def _canonical(name: str) -> str:
    for prefix, canonical in _PREFIXES:
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
    return name


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype that the model will compute in, from the file headers alone."""
    for name, path in list(_tensor_files(directory)):
        if _canonical(name) == "text.embed_tokens.weight":
            tensor: Tensor = _open(path).get_tensor(name)
            return tensor.dtype
    raise BadModel(f"{directory} has no text.embed_tokens.weight: its safetensors do not hold a LLaVA decoder")
