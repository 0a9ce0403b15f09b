"""The processor: torch and the native attention kernel. Serves everything."""

from __future__ import annotations

from ...config import KvShape, Progress
from ...kv.store import RowStore
from ...model import checkpoint
from ...model.spec import ModelSpec
from ...model.vision_language import VisionLanguageModel
from ..base import Backend
from ..target import Target
from .backend import TorchBackend


class Cpu(Target):
    """A checkpoint on the processor."""

    def load(self, spec: ModelSpec, shape: KvShape, pages: int, progress: Progress | None) -> Backend:
        model = VisionLanguageModel(spec, checkpoint.load_weights(self.directory, progress, spec.prefixes))
        return TorchBackend(model, RowStore(pages, shape, model.dtype))
