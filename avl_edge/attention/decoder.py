"""A decoder of the LLaMA family as one native call for each step: `plugins/cpu/decoder.cpp`, in the library of the
attention kernel. Knows addresses and sizes, no model.

Sums are float32. Vectors that meet bfloat16 or int4 weights are rounded to bfloat16, as torch rounds them, but in
models of float32; between
products nothing is rounded. A sequence's numbers are the same, bit for bit, in any batch and with any number of
threads.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kv.books.base import address
from . import native

ROW_FORMATS = ("exact", "int8", "int8/int4", "int4")
"""Of rows, in the order in which a step lists them."""
DENSE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of the formats of dense weights, and of exact rows."""

# The structures of plugins/cpu/products.h and plugins/cpu/decoder.h, which say what their fields mean.
_MATRIX = struct.Struct("4P4q")
_DECODER = struct.Struct("2P" + "4P4q" * 2 + "2Pq7i2f4x")
_STEP = struct.Struct("10Pqi4x")


def _place(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Matrix:
    """Weights ``[outputs, inputs]`` as a product reads them, and a bias float32 ``[outputs]``.

    ``data``: dense, contiguous float32, bfloat16 or float16; or codes: int8 ``[outputs, inputs]``, or uint8
    ``[outputs, inputs / 2]``, element 2 i in the low half of a byte. A code means (code - zero) * scale, with float32
    ``scales`` ``[outputs, inputs / group]``; ``zeros`` uint8 of the same shape for codes of 4 bits, None: 8. A group of
    these is 32, 64 or a multiple of 128. ``rounds``: whether vectors are rounded to bfloat16 for such codes.
    """

    data: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    rounds: bool = True

    def pack(self) -> bytes:
        """As the library takes it."""
        outputs, inputs = self.data.shape
        kind = DENSE.get(self.data.dtype, 3 if self.data.dtype == torch.int8 else 4 if self.rounds else 5)
        inputs *= 2 if kind > 3 else 1
        group = inputs // self.scales.shape[1] if self.scales is not None else 0
        kept = (self.data, self.scales, self.zeros, self.bias)
        if not all(each is None or each.is_contiguous() for each in kept):
            raise ValueError("weights, scales, zeros and biases are contiguous tensors")
        return _MATRIX.pack(*map(_place, kept), outputs, inputs, group, kind)


@dataclass(frozen=True)
class Layer:
    """A decoder layer: weights float32 ``[hidden]`` of its norms, its matrices, from the queries' on ``query, key,
    value, out, gate, up, down``, and weights float32 ``[d]`` of the norms of query and key heads, None: there are
    none."""

    attention_norm: Tensor
    mlp_norm: Tensor
    matrices: Sequence[Matrix]
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """A decoder's: ``norm`` float32 ``[hidden]`` is the last one, ``embedding`` is dense; queries have ``heads``."""

    layers: Sequence[Layer]
    norm: Tensor
    embedding: Matrix
    head: Matrix
    heads: int
    epsilon: float


@dataclass(frozen=True)
class Step:
    """What a step takes of B sequences and L layers: contiguous arrays on the CPU.

    ``tokens`` int32 ``[B]``; ``cosines`` and ``sines`` float32 ``[B, d]``, RoPE's; ``slots`` int32 ``[L, B]``, where
    new rows go, in the formats with the numbers ``written`` int32 ``[B]`` among :data:`ROW_FORMATS`; ``smoothing``
    int32 ``[L, B]``, the exact rows by which keys are smoothed, -1: none; ``rows`` int32 ``[L, capacity]``, those that
    are attended, format by format and sequence by sequence, as ``offsets`` int32 ``[L, formats * B + 1]`` say.
    """

    tokens: npt.NDArray[np.int32]
    cosines: npt.NDArray[np.float32]
    sines: npt.NDArray[np.float32]
    slots: npt.NDArray[np.int32]
    written: npt.NDArray[np.int32]
    smoothing: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]


class NativeDecoder:
    """A decoder over a pool's rows, with threads of its own, which sleep between steps."""

    def __init__(self, weights: Weights, keys: Tensor, values: Tensor, threads: int) -> None:
        """``keys`` and ``values`` ``[rows, kv_heads, d]`` are a pool's exact rows, the values right behind the keys in
        memory; ``threads`` 1 or more, the caller's own among them.

        ValueError for what does not fit together, OSError where the system gives no such threads or the library is
        missing.
        """
        library = native.library()
        if library is None:
            raise OSError(errno.ENOENT, "the native library was not built")
        self._kept = weights, keys, values
        _, kv_heads, dim = keys.shape
        self._size = len(weights.layers), weights.head.data.shape[0], dim
        layers = b"".join(
            struct.pack("4P", *map(_place, (each.attention_norm, each.mlp_norm, each.query_norm, each.key_norm)))
            + b"".join(matrix.pack() for matrix in each.matrices)
            for each in weights.layers
        )
        buffer = ctypes.create_string_buffer(layers, len(layers))
        hidden = weights.norm.numel()
        sizes = (len(weights.layers), hidden, weights.heads, kv_heads, dim, DENSE[keys.dtype], threads)
        packed = struct.pack(
            _DECODER.format,
            ctypes.addressof(buffer),
            weights.norm.data_ptr(),
            *_MATRIX.unpack(weights.embedding.pack()),
            *_MATRIX.unpack(weights.head.pack()),
            keys.data_ptr(),
            values.data_ptr(),
            keys.nbytes,
            *sizes,
            weights.epsilon,
            dim**-0.5,
        )
        library.avl_decoder_step.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
        self._handle: int | None = library.avl_decoder_open(packed)
        if self._handle is None:
            raise _error(ctypes.get_errno())
        self._step = library.avl_decoder_step
        weakref.finalize(self, library.avl_decoder_close, self._handle)

    def step(self, step: Step, scores: npt.NDArray[np.float32] | None = None) -> Tensor:
        """Run a step: logits float32 ``[B, vocabulary]``. ``scores`` float32 ``[L, capacity]``, where they are asked
        for, gets the share of attention of each row, its mean over the heads.

        ValueError for tables that do not fit, IndexError for a token or a row that is none: then nothing was written.
        """
        batch, (layers, vocabulary, dim) = len(step.tokens), self._size
        lists, capacity = len(ROW_FORMATS) * batch, step.rows.shape[1]
        tables: list[tuple[npt.NDArray[Any], tuple[int, ...]]] = [
            (step.tokens, (batch,)),
            (step.slots, (layers, batch)),
            (step.written, (batch,)),
            (step.smoothing, (layers, batch)),
            (step.rows, (layers, capacity)),
            (step.offsets, (layers, lists + 1)),
            (step.cosines, (batch, dim)),
            (step.sines, (batch, dim)),
        ]
        kinds = [np.int32] * 6 + [np.float32] * 3
        if scores is not None:
            tables.append((scores, (layers, capacity)))
        for (table, shape), kind in zip(tables, kinds, strict=False):
            if table.shape != shape or table.dtype != kind or not table.flags.c_contiguous:
                raise ValueError(f"a table of a step is {kind.__name__} {list(shape)}, not {table.dtype} {table.shape}")
        logits = torch.empty(batch, vocabulary, dtype=torch.float32)
        addresses = [address(table) for table, _ in tables] + ([0] if scores is None else [])
        packed = _STEP.pack(*addresses, logits.data_ptr(), capacity, batch)
        status = self._step(self._handle, packed)
        if status:
            raise _error(status)
        return logits


def multiply(matrix: Matrix, vectors: Tensor, threads: int = 1, times: int = 1) -> Tensor:
    """``vectors`` float32 ``[B, inputs]`` by a matrix as a step does it: ``[B, outputs]``, computed ``times`` over, for
    benchmarks. Raises as :class:`NativeDecoder`."""
    library = native.library()
    if library is None:
        raise OSError(errno.ENOENT, "the native library was not built")
    vectors = vectors.float().contiguous()
    out = torch.empty(len(vectors), matrix.data.shape[0])
    addresses = (ctypes.c_void_p(vectors.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    status = library.avl_multiply(matrix.pack(), *addresses, len(vectors), threads, times)
    if status:
        raise _error(status)
    return out


def _error(status: int) -> Exception:
    if status == errno.EINVAL:
        return ValueError("sizes, formats or tables of the decoder do not fit together")
    if status == errno.ERANGE:
        return IndexError("a token or a row of the step is outside its table")
    if status == errno.ENOMEM:
        return MemoryError("no memory for a decode step")
    return OSError(status, os.strerror(status))
