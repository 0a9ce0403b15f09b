"""The processor: torch, and the native step or attention kernel. Serves everything."""

from __future__ import annotations

from ...config import KvShape, Progress
from ...kv.store import RowStore
from ...model import checkpoint
from ...model.network import Llava
from ...model.spec import ModelSpec
from ..base import Backend
from ..target import Target
from . import native
from .backend import TorchBackend
from .native import NativeBackend


class Cpu(Target):
    """A checkpoint on the processor."""

    def load(self, spec: ModelSpec, shape: KvShape, pages: int, progress: Progress | None) -> Backend:
        model = Llava(spec, checkpoint.load_weights(self.directory, progress))
        store = RowStore(pages, shape, model.dtype)
        return NativeBackend(model, store, self.threads) if native.serves(model) else TorchBackend(model, store)
