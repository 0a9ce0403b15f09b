"""The processor: torch and the native attention kernel. Serves everything."""

from __future__ import annotations

from ...config import KvShape
from ...kv.pool import RowStore
from ...model import checkpoint
from ...model.checkpoint import Progress
from ...model.network import Llava
from ...model.spec import ModelSpec
from ..place import Loaded, Place
from ..stored import StoredRows
from .backend import TorchBackend


class Cpu(Place):
    """A checkpoint on the processor."""

    def load(self, spec: ModelSpec, shape: KvShape, pages: int, progress: Progress | None) -> Loaded:
        model = Llava(spec, checkpoint.load_weights(self.directory, progress))
        store = RowStore(pages, shape, model.dtype)
        return Loaded(TorchBackend(model, store), StoredRows(store, model.decoder.angles))
