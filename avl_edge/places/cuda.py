"""A GPU: torch, our kernels, and a CUDA graph for each kind of step."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint
from ..checkpoint import Progress
from ..config import KvShape, PromptShape
from ..cuda_backend import CudaBackend, CudaDevice, load_model, require_served
from ..policies import Choice
from ..pool import RowStore
from ..spec import ModelSpec
from ..stored import StoredRows
from .base import Loaded, Place


class Cuda(Place):
    """A checkpoint on the first GPU; :class:`~avl_edge.cuda.NoCuda` where there is none."""

    no_scenes = "the GPU serves no scenes: ask about the pictures with generate, or use the cpu"
    no_relief = "rows on a GPU cannot be stored smaller while they are read: use the device cpu"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._gpu = CudaDevice()

    def check(self, choice: Choice, prompt: PromptShape, spec: ModelSpec) -> None:  # noqa: ARG002
        require_served(choice.formats)

    def load(self, spec: ModelSpec, shape: KvShape, pages: int, progress: Progress | None) -> Loaded:
        model = load_model(spec, checkpoint.load_weights(self.directory, progress), self._gpu.device)
        store = RowStore(pages, shape, model.dtype, str(self._gpu.device))
        return Loaded(CudaBackend.on_gpu(model, store, self._gpu), StoredRows(store, model.decoder.angles))
