"""The processor with the decode step as one native call; prompts and pictures are torch's.

Tables up (what each sequence reads, in all layers), one call, results down (logits and scores), then every policy
settles: the form that a step has on a GPU (:mod:`avl_edge.backends.steps`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...attention import native
from ...attention.decoder import DENSE, ROW_FORMATS, Layer, Matrix, NativeDecoder, Step, Weights
from ...kv.selection import Selection, StepScores, is_low_rank, list_rows
from ...kv.store import RowStore
from ...model.vision_language import VisionLanguageModel
from ...model.weights import Dense, LinearWeight
from ..step_batch import StepBatch, StepResult
from .backend import Asked, TorchBackend

Floats = npt.NDArray[np.float32]


def serves(model: VisionLanguageModel) -> bool:
    """Whether the native step runs this model: gated by SiLU, in float32, bfloat16 or float16, with even heads and
    weights whose groups are neighbours; and the library is there."""
    text, linears = model.spec.text, [each for layer in model.decoder.layers for each in layer.linears]
    return (
        native.available()
        and model.dtype in DENSE
        and text.activation == "silu"
        and text.head_dim % 2 == 0
        and model.decoder.embedding.is_contiguous()
        and all(isinstance(each, Dense) or each.order is None for each in (*linears, model.decoder.head))
    )


def default_threads() -> int:
    """As many as torch uses, and no more than this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores))


class NativeBackend(TorchBackend):
    """:class:`TorchBackend`, whose steps are one native call each.

    Where a step picks its core as it goes (`coarse`), or reads low-rank rows, it is torch's: ``native_steps`` and
    ``torch_steps`` count both.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        store: RowStore,
        threads: int | None = None,
        *,
        decoder: Callable[[Weights, Tensor, Tensor, int], NativeDecoder] = NativeDecoder,
    ) -> None:
        """A model that this module :func:`serves`. ``threads``: of a step, :func:`default_threads` where None;
        ``decoder`` runs it."""
        super().__init__(model, store)
        self.name = "torch-cpu+native-step"
        self.native_steps = self.torch_steps = 0
        self._rope: list[Floats] = [np.empty((0, store.shape.head_dim), dtype=np.float32)] * 2
        self._decoder = decoder(decoder_weights(model), *store.arenas("exact"), threads or default_threads())

    def _decode(self, batch: StepBatch, asked: Sequence[Asked], *, greedy: bool) -> StepResult:
        if any(picks_core or any(map(is_low_rank, read)) for picks_core, _, read in asked):
            self.torch_steps += 1
            return super()._decode(batch, asked, greedy=greedy)
        self.native_steps += 1
        reads = [read for _, _, read in asked]
        tables = _Tables(batch, reads)
        weights = np.empty(tables.rows.shape, dtype=np.float32) if any(wanted for _, wanted, _ in asked) else None
        logits = self._decoder.step(tables.step(batch, *self._angles(batch.positions)), weights)
        for at, (cache, (_, wanted, read)) in enumerate(zip(batch.caches, asked, strict=True)):
            scores = StepScores(read, np.float32) if wanted else None
            if scores is not None and weights is not None:
                scores.give(tables.lists[at], tables.offsets, weights)
            batch.attempt(at, self._settle, cache, scores)
        return batch.result(tokens=logits.argmax(-1).tolist()) if greedy else batch.result(logits=logits)

    def _angles(self, positions: Sequence[int]) -> list[Floats]:
        """RoPE's cosines and sines ``[B, d]``, as the model rounds them, from tables that grow with the positions."""
        reach = max(positions) + 1
        if reach > len(self._rope[0]):
            angles = self.model.decoder.angles(torch.arange(2 * reach))
            self._rope = [each.float().flatten(1).numpy() for each in angles]
        return [table[positions] for table in self._rope]


class _Tables:
    """What a batch reads, in all layers: ``rows`` and ``offsets`` as in a :class:`Step`, and which ``lists`` are each
    sequence's."""

    def __init__(self, batch: StepBatch, reads: Sequence[Sequence[Selection]]) -> None:
        count = len(reads)
        self.lists = [[ROW_FORMATS.index(each.format) * count + n for each in read] for n, read in enumerate(reads)]
        numbered = [pair for own, read in zip(self.lists, reads, strict=True) for pair in zip(own, read, strict=True)]
        layers = len(batch.slots[0])
        self.offsets = np.zeros((layers, len(ROW_FORMATS) * count + 1), dtype=np.int32)
        for number, each in numbered:
            self.offsets[:, number + 1] += each.counts
        np.cumsum(self.offsets, axis=1, out=self.offsets)
        self.rows = np.empty((layers, int(self.offsets[:, -1].max())), dtype=np.int32)
        list_rows(numbered, self.offsets, self.rows)

    def step(self, batch: StepBatch, cosines: Floats, sines: Floats) -> Step:
        return Step(
            np.array(batch.token_ids, dtype=np.int32),
            cosines,
            sines,
            _by_layer(batch.slots),
            np.array([ROW_FORMATS.index(cache.formats.text) for cache in batch.caches], dtype=np.int32),
            _by_layer([cache.rows.smoothing for cache in batch.caches]),
            self.rows,
            self.offsets,
        )


def _by_layer(of_sequences: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(np.stack(of_sequences, axis=1))


def decoder_weights(model: VisionLanguageModel) -> Weights:
    """A network's decoder as the native step takes it; matrices stay where they are."""
    decoder, text, exact = model.decoder, model.spec.text, model.dtype == torch.float32
    layers = [
        Layer(
            each.attention_norm.weight.float(),
            each.mlp_norm.weight.float(),
            [_matrix(of, exact) for of in each.linears],
            *(None if norm is None else norm.weight.float() for norm in (each.query_norm, each.key_norm)),
        )
        for each in decoder.layers
    ]
    return Weights(
        layers,
        decoder.norm.weight.float(),
        Matrix(decoder.embedding),
        _matrix(decoder.head, exact),
        text.heads,
        text.norm_eps,
    )


def _matrix(linear: LinearWeight, exact: bool) -> Matrix:
    bias = None if linear.bias is None else linear.bias.float()
    if isinstance(linear, Dense):
        return Matrix(linear.weight.contiguous(), bias)
    return Matrix(linear.codes.contiguous(), bias, linear.scales.contiguous(), linear.zeros, rounds=not exact)
