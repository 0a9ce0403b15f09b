"""The processor: torch and the native attention kernel. Serves everything."""

from __future__ import annotations

from ...config import KvShape
from ...kv.store import RowStore
from ...model import checkpoint
from ...model.checkpoint import Progress
from ...model.network import Llava
from ...model.spec import ModelSpec
from ..stored import StoredRows
from ..target import Loaded, Target
from .backend import TorchBackend


class Cpu(Target):
    """A checkpoint on the processor."""

    def load(self, spec: ModelSpec, shape: KvShape, pages: int, progress: Progress | None) -> Loaded:
        model = Llava(spec, checkpoint.load_weights(self.directory, progress))
        store = RowStore(pages, shape, model.dtype)
        return Loaded(TorchBackend(model, store), StoredRows(store, model.decoder.angles))
