"""A GPU: torch, our kernels, and a CUDA graph for each kind of step. Serves everything."""

from __future__ import annotations

from pathlib import Path

from ...config import KvShape, Progress, PromptShape, require
from ...kv.layout import Format
from ...kv.methods import Choice
from ...kv.store import RowStore
from ...machine.ledger import Entry
from ...model import checkpoint
from ...model.spec import ModelSpec
from ..base import Backend
from ..steps import CudaDevice
from ..target import Target
from . import CudaBackend, kernel_shape, load_model


class Cuda(Target):
    """A checkpoint on the first GPU; :class:`~avl_edge.attention.cuda.NoCuda` where there is none."""

    cannot_give_back = (
        "no part of a GPU's rows can be handed back to the system, so that smaller ones would leave no more to others: "
        "give a KV budget instead of a reserve, or use the device cpu"
    )

    library_bytes = 2**30
    """With the context of the GPU. An assumption, as in the profiles of Jetsons: measured on none."""
    recorded_steps_bytes = 256 * 2**20

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._gpu = CudaDevice()

    def check_model(self, spec: ModelSpec) -> None:
        kernel_shape(spec.text, self.dtype)

    def check(self, choice: Choice, prompt: PromptShape, spec: ModelSpec) -> None:  # noqa: ARG002
        low_rank = any(Format(name).rank is not None for name in choice.formats.by_tier().values())
        require(
            not (low_rank and "mrope_section" in spec.text.rope),
            "the GPU's kernels rebuild low-rank keys at positions of one axis, and this model has three (M-RoPE): give "
            "other formats, or use the device cpu",
        )

    def load(
        self, spec: ModelSpec, shape: KvShape, pages: int, progress: Progress | None, recorded_steps: Entry
    ) -> Backend:
        model = load_model(
            spec, checkpoint.load_weights(self.directory, progress, spec.prefixes, self.packed), self._gpu.device
        )
        store = RowStore(pages, shape, model.dtype, str(self._gpu.device))
        return CudaBackend.on_gpu(model, store, self._gpu, recorded_steps)
