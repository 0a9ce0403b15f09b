"""The processor: torch, and the native step or attention kernel. Serves everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...config import KvShape, Picture, Progress
from ...kv.store import RowStore
from ...machine.ledger import Entry
from ...model import checkpoint
from ...model.checkpoint_files import stored_bytes
from ...model.sizes import ModelShape
from ...model.spec import ModelSpec
from ...model.vision_language import VisionLanguageModel
from ...model.weight_format import WeightFormats
from ..base import Backend
from ..target import Target
from . import native
from .backend import TorchBackend
from .native import NativeBackend


class Cpu(Target):
    """A checkpoint on the processor."""

    def weight_bytes(self, model: ModelShape) -> int:
        """The checkpoint's files: all of them is mapped and read, also what no layer takes; of matrices that are packed
        as they are read, the file's pages are given back."""
        packed = super().weight_bytes(model)
        if self.packed != WeightFormats():
            return packed
        return max(packed, stored_bytes(self.directory))

    def workspace_bytes(self, model: ModelShape, pictures: Sequence[Picture], tokens: int, image_tokens: int) -> int:
        if self.dtype != torch.float16:
            return super().workspace_bytes(model, pictures, tokens, image_tokens)
        # Prompts in float16 are widened here, a matrix at a time.
        decoder, wide = model.decoder, replace(model, itemsize=4)
        matrix = 4 * decoder.hidden_size * max(decoder.intermediate_size, decoder.query_size)
        return super().workspace_bytes(wide, pictures, tokens, image_tokens) + matrix

    def load(
        self,
        spec: ModelSpec,
        shape: KvShape,
        pages: int,
        progress: Progress | None,
        recorded_steps: Entry,  # noqa: ARG002
    ) -> Backend:
        model = VisionLanguageModel(spec, checkpoint.load_weights(self.directory, progress, spec.prefixes, self.packed))
        store = RowStore(pages, shape, model.dtype)
        return NativeBackend(model, store, self.threads) if native.serves(model) else TorchBackend(model, store)
