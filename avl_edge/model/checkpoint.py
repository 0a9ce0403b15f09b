"""A Hugging Face checkpoint directory: its weights, memory-mapped, by canonical name.

Canonical names: ``text.*`` (embed_tokens, layers.N.*, norm), ``head.weight``, ``vision.*``, ``projector.*``.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..config import Progress, require
from ..errors import BadModel, quoted
from ..files import read_json
from ..machine import allocator
from .checkpoint_files import map_tensors, read_dtype
from .weight_format import WeightFormat, WeightFormats
from .weights import Dense, Grouped, LinearWeight, QuantFormat, StoredLayer, pack, quant_format

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_QUANTIZED_PARTS = ("qweight", "weight_packed", "weight_scale")
DECODER_MATRIX = re.compile(r"text\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
"""The decoder's matrices by canonical name, but for its embedding and head."""


class Weights:
    """Tensors by canonical name, in the dtype of the embedding (``dtype``).

    :meth:`take` checks shapes, so that a wrong file fails at load, by name; what nobody takes does not matter.
    ``quantized`` is how the linear layers that are not plain are stored, ``packed`` has those that were packed as they
    were loaded.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        quantized: QuantFormat | None = None,
        packed: Mapping[str, Grouped] | None = None,
    ) -> None:
        self._tensors = tensors
        self._quantized = quantized
        self._packed = packed or {}
        self.dtype = torch.float32
        if "text.embed_tokens.weight" in tensors:
            self.dtype = tensors["text.embed_tokens.weight"].dtype

    def renamed(self, names: Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]) -> Weights:
        """The same by other names; one tensor may be several."""
        renamed = dict(pair for name, tensor in self._tensors.items() for pair in names(name, tensor))
        return Weights(renamed, self._quantized, self._packed)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor ``name``; :class:`BadModel` when it is not there or not of ``shape``."""
        tensor = self._tensors.get(name)
        if tensor is None:
            first = ", ".join(quoted(each) for each in list(self._tensors)[:3])
            raise BadModel(
                f"the checkpoint has no weights for {name}, its first tensors are {first}: is it complete, and does "
                "config.json match it?"
            )
        if shape:
            self._require_shape(name, tuple(tensor.shape), shape)
        if tensor.dtype not in _DTYPES:
            raise BadModel(f"{name} is stored as {tensor.dtype}: only float checkpoints are supported")
        return tensor.to(self.dtype)

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool = False) -> LinearWeight:
        """The linear layer ``name`` in the format that its tensors are in. ``bias`` is what config.json says; a file
        that says otherwise is no match for it."""
        stored = self._quantized if self._quantized and self._quantized.stores(name, self._tensors) else None
        own = self.take(f"{name}.bias", outputs) if bias else None
        if not bias and not (stored and self._has_zeros(f"{name}.bias")):
            self.deny(f"{name}.bias")
        packed = self._packed.get(name)
        if packed is not None:
            self._require_shape(f"{name}.weight", (packed.outputs, packed.inputs), (outputs, inputs))
            return replace(packed, bias=own)
        if stored:
            return self._read(stored, StoredLayer(name, outputs, inputs, self._tensors, own))
        for part in _QUANTIZED_PARTS:
            if f"{name}.{part}" in self._tensors:
                raise BadModel(
                    f"{name}.{part} belongs to a quantised layer, but config.json has no quantization_config of that "
                    "format: copy the checkpoint's config.json again"
                )
        return Dense(self.take(f"{name}.weight", outputs, inputs), own)

    def _read(self, stored: QuantFormat, layer: StoredLayer) -> Grouped:
        """Of what is held in another form, the file's pages are given back."""
        found = stored.read(layer)
        for name, tensor in self._tensors.items():
            if name.rpartition(".")[0] == layer.name:
                (_page_in if tensor.data_ptr() == found.codes.data_ptr() else _forget)(tensor)
        return found

    def has(self, layer: str) -> bool:
        """Whether there are weights of that layer, in any format."""
        return layer in self._packed or any(
            f"{layer}.{part}" in self._tensors for part in ("weight", *_QUANTIZED_PARTS)
        )

    def _require_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise BadModel(f"{name} has shape {list(found)}, but config.json asks for {list(expected)}")

    def _has_zeros(self, name: str) -> bool:
        """GPTQ's packages store a bias of zeros for layers that have none."""
        return name in self._tensors and not bool(self._tensors[name].any())

    def deny(self, name: str) -> None:
        """:class:`BadModel` when the file has ``name`` though config.json says that there is none."""
        if name in self._tensors:
            raise BadModel(f"the checkpoint has {name}, which config.json says the model does not: they do not match")


def load_weights(
    directory: Path,
    progress: Progress | None = None,
    prefixes: Mapping[str, str] = MappingProxyType({}),
    formats: WeightFormats | None = None,
) -> Weights:
    """Memory-map all safetensors of ``directory``; read them once, so that the wait is here and not in an answer.
    ``prefixes``: those of the model's family (:attr:`avl_edge.model.spec.ModelSpec.prefixes`).

    With ``formats``, the decoder's matrices are packed one by one, and of these the file's pages may be forgotten.
    :class:`BadInput` where groups do not divide a matrix, or where the checkpoint is quantised already.
    """
    quantized, formats = _quantized(directory), formats or WeightFormats()
    require(
        quantized is None or formats == WeightFormats(),
        f"{directory} is quantised already: leave out --weights and --head, or give the 16-bit checkpoint",
    )
    mapped = map_tensors(directory, prefixes)
    tensors = {name: each.tensor for name, each in mapped.items()}
    packed: dict[str, Grouped] = {}
    for done, (name, (_, tensor)) in enumerate(mapped.items(), start=1):
        packings = _packings(name, tied="head.weight" not in mapped, formats=formats)
        packed |= {layer: pack(tensor, form) for layer, form in packings.items() if tensor.ndim == 2}
        layer = name.rpartition(".")[0]
        if layer in packed:
            _forget(tensor)
        elif quantized is None or not quantized.stores(layer, tensors):
            _page_in(tensor)
        if progress:
            progress(done, len(mapped))
    require(
        formats.body is None or any(layer != "head" for layer in packed),
        f"the layers of {directory} have names of their own and cannot be packed: leave out --weights",
    )
    return Weights(tensors, quantized, packed)


def _packings(name: str, *, tied: bool, formats: WeightFormats) -> dict[str, WeightFormat]:
    """What the tensor ``name`` is packed as, by the linear layer that it is the matrix of."""
    found = {}
    if formats.body is not None and DECODER_MATRIX.fullmatch(name):
        found[name.removesuffix(".weight")] = formats.body
    if formats.head is not None and name == ("text.embed_tokens.weight" if tied else "head.weight"):
        found["head"] = formats.head
    return found


def is_quantized(directory: Path) -> bool:
    """Whether config.json says so; :class:`BadModel` for a format that is not served."""
    return _quantized(directory) is not None


def _quantized(directory: Path) -> QuantFormat | None:
    return quant_format(read_json(directory / "config.json") or {})


def _page_in(tensor: Tensor) -> None:
    """Touch every page of a mapped tensor."""
    if tensor.is_contiguous():
        tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def _forget(tensor: Tensor) -> None:
    """Let the system have the pages of a mapped tensor, which are read from the file again if anybody asks."""
    if tensor.is_contiguous():
        allocator.advise_free(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def stored_dtype(directory: Path, prefixes: Mapping[str, str] = MappingProxyType({})) -> torch.dtype:
    """The dtype that the model will compute in, from config.json and the file headers alone; :class:`BadModel` for
    weights in a format that is not served."""
    _quantized(directory)
    return read_dtype(directory, "text.embed_tokens.weight", prefixes)
