"""The engines of a package: what runs, by which table of bindings, and up to which sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...attention.cuda import FORMATS
from ...kv.layout import UNIT
from ...kv.store import RowStore
from ...model.families.llava import LlavaSpec
from ...package.engine import Recipe
from ...package.export import Binding, Bindings
from ...package.export import bindings as names


class Context(Protocol):
    """Where a graph runs: :class:`avl_edge.backends.tensorrt.Context`."""

    def run(self, dims: Mapping[str, int], addresses: Mapping[str, int], stream: int) -> None: ...


class Runner(Protocol):
    """What runs a graph: :class:`avl_edge.backends.tensorrt.Engine`."""

    memory_bytes: int

    def take_memory(self, address: int) -> None: ...

    def context(self, profile: int, stream: int) -> Context: ...


@dataclass(frozen=True)
class Engines:
    """A model's two engines, their tables, and the sizes that they were built for."""

    spec: LlavaSpec
    recipe: Recipe
    vision: Runner
    vision_bindings: Bindings
    decoder: Runner
    decoder_bindings: Bindings


def parts_of(formats: Collection[str]) -> tuple[str, ...]:
    """The formats of the parts in a call that reads rows of these: the first of those that engines read, whether there
    are rows of all of them or not."""
    every = tuple(FORMATS)
    return every[: 1 + max((every.index(name) for name in formats), default=0)]


def pool_of(store: RowStore) -> dict[str, Tensor]:
    """The pool as the decoder's engine is given it: rows, and the words of the same memory."""
    words = [arena.view(torch.int32).view(-1, UNIT // 4) for arena in (store.key_bytes, store.value_bytes)]
    return {
        names.POOL_KEYS: store.keys,
        names.POOL_VALUES: store.values,
        names.POOL_KEY_WORDS: words[0],
        names.POOL_VALUE_WORDS: words[1],
    }


def pool_dims(store: RowStore) -> dict[str, int]:
    """The dimensions of :func:`pool_of`."""
    return {"R": len(store.keys), "U": store.key_bytes.numel() // UNIT}


class Buffers:
    """A tensor for each binding of a run, those that are ``given``, ``own`` ones for the others, and their addresses.

    An input without elements has an address like all others, as TensorRT wants one.
    """

    def __init__(
        self, bindings: Iterable[Binding], dims: Mapping[str, int], device: torch.device, given: Mapping[str, Tensor]
    ) -> None:
        self.dims = dims
        self._tensors, self.addresses = {}, {}
        self.own: list[Tensor] = []
        for binding in bindings:
            shape, dtype = binding.shape_at(dims), getattr(torch, binding.dtype)
            tensor = given.get(binding.name)
            if tensor is None:
                tensor = torch.empty(shape, dtype=dtype, device=device)
                self.own.append(tensor)
            _check_memory(binding.name, tensor, shape, dtype)
            # Of a tensor without elements torch gives no address.
            place = tensor if tensor.numel() else torch.empty(1, dtype=dtype, device=device)
            self._tensors[binding.name] = (tensor, place)
            self.addresses[binding.name] = int(place.data_ptr())

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name][0]

    @classmethod
    def of(
        cls, bindings: Bindings, dims: Mapping[str, int], device: torch.device, given: Mapping[str, Tensor]
    ) -> Buffers:
        """For all inputs and outputs."""
        return cls((*bindings.inputs, *bindings.outputs), dims, device, given)


def _check_memory(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """ValueError for other memory than an engine was built for: it gets an address alone, and writes there."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not contiguous {dtype} {list(shape)}")
    # Device memory is aligned where it begins, and TensorRT wants multiples of 256.
    if tensor.storage_offset() * tensor.itemsize % 256:
        raise ValueError(f"{name} begins within other memory")
