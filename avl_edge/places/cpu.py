"""The processor: torch and the native attention kernel. Serves everything."""

from __future__ import annotations

from .. import checkpoint
from ..backend import TorchBackend
from ..checkpoint import Progress
from ..config import KvShape
from ..models import Llava
from ..pool import RowStore
from ..spec import ModelSpec
from ..stored import StoredRows
from .base import Loaded, Place


class Cpu(Place):
    """A checkpoint on the processor."""

    def load(self, spec: ModelSpec, shape: KvShape, pages: int, progress: Progress | None) -> Loaded:
        model = Llava(spec, checkpoint.load_weights(self.directory, progress))
        store = RowStore(pages, shape, model.dtype)
        return Loaded(TorchBackend(model, store), StoredRows(store, model.decoder.angles))
