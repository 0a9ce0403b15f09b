"""Export a checkpoint: the graphs and their weights as files of fixed names in one directory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...config import Progress
from ...errors import BadInput
from ...model.checkpoint import Weights, load_weights
from ...model.families.llava import LlavaSpec
from .bindings import Bindings, decoder_bindings, row_formats, vision_bindings
from .core_attention import for_plugin, reference_function
from .decoder import build_decoder
from .graph import DTYPES, Graph, WeightCount, WeightFile
from .vision import build_vision

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto

VISION, DECODER, PLUGIN_DECODER = "vision.onnx", "decoder.onnx", "decoder.plugin.onnx"
PRECISIONS = tuple(DTYPES)


@dataclass(frozen=True)
class Settings:
    """How to export. ``precision`` is the dtype of weights and arithmetic; ``prune_after`` the decoder layer (0-based)
    after which prompt tokens can be pruned, None for nowhere."""

    precision: str
    prune_after: int | None = None


class _Shapes(Weights):
    """Every tensor that is asked for, by its shape alone."""

    def __init__(self) -> None:
        super().__init__({})

    def take(self, name: str, *shape: int) -> Tensor:  # noqa: ARG002
        return torch.empty(shape, device="meta")

    def deny(self, name: str) -> None:
        """There is no file that could hold it."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write. ``weights`` in bytes by the graph's file name, ``tensors`` the number of all of them,
    ``largest`` the bytes of the largest; ``digest`` tells graphs apart by everything but their weights."""

    weights: dict[str, int]
    tensors: int
    largest: int
    digest: str

    @property
    def bytes(self) -> int:
        """Of all weights; the graphs themselves are a few hundred kB beside them."""
        return sum(self.weights.values())


def plan_export(spec: LlavaSpec, settings: Settings) -> ExportPlan:
    """Build the graphs without their weights: takes milliseconds, and reads no checkpoint."""
    counts, digest = {}, hashlib.sha256()
    for name, (build, bindings, functions) in _graphs(spec, settings).items():
        counts[name] = WeightCount()
        graph = Graph(_Shapes(), settings.precision, counts[name])
        build(graph)
        digest.update(_bytes(graph.model(name, bindings, functions)))
    return ExportPlan(
        weights={name: count.bytes for name, count in counts.items()},
        tensors=sum(count.tensors for count in counts.values()),
        largest=max(count.largest for count in counts.values()),
        digest=digest.hexdigest(),
    )


def export_model(
    spec: LlavaSpec, directory: Path, out: Path, settings: Settings, progress: Progress | None = None
) -> None:
    """Write the graphs of the checkpoint in ``directory`` into ``out``, which exists and is empty.

    ``progress`` counts tensors written. Raises :class:`BadModel` for a checkpoint that does not fit its config, and
    OSError where the disk does not take the files.
    """
    wrote = _counter(plan_export(spec, settings).tensors, progress)
    weights = load_weights(directory, prefixes=spec.prefixes)
    for name, (build, bindings, functions) in _graphs(spec, settings).items():
        file = WeightFile(out / f"{name}.data", wrote)
        try:
            graph = Graph(weights, settings.precision, file)
            build(graph)
        finally:
            file.close()
        model = graph.model(name.removesuffix(".onnx"), bindings, functions)
        (out / name).write_bytes(_bytes(model))
        if functions:
            (out / PLUGIN_DECODER).write_bytes(_bytes(for_plugin(model)))


_Parts = tuple[Callable[[Graph], None], Bindings, "tuple[FunctionProto, ...]"]


def _graphs(spec: LlavaSpec, settings: Settings) -> dict[str, _Parts]:
    """Per file: what adds the nodes, the bindings, and the functions of the model."""
    text, prune_after, precision = spec.text, settings.prune_after, settings.precision
    if prune_after is not None and not 0 <= prune_after < text.layers - 1:
        raise BadInput(f"tokens cannot be pruned after layer {prune_after} of a decoder of {text.layers} layers")
    return {
        VISION: (lambda graph: build_vision(graph, spec), vision_bindings(spec, precision), ()),
        DECODER: (
            lambda graph: build_decoder(graph, text, prune_after),
            decoder_bindings(spec, precision, prune_after),
            (reference_function(text.heads, text.kv_heads, text.head_dim, row_formats(text, precision)),),
        ),
    }


def _bytes(model: ModelProto) -> bytes:
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _counter(total: int, progress: Progress | None) -> Callable[[], None]:
    done = 0

    def wrote() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    return wrote
