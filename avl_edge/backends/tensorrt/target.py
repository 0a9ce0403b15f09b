"""TensorRT: a package's engines, on the device that they were built on."""

from __future__ import annotations

from pathlib import Path

import torch

from ...config import KvShape, Progress, PromptShape, require
from ...kv.methods import Choice
from ...kv.store import RowStore
from ...machine.device import probe
from ...machine.ledger import Entry
from ...model.spec import ModelSpec
from ...package.engine import DECODER_ENGINE, MODEL_FILES, VISION_ENGINE, Job, Platform, decoder_formats, open_package
from ...package.export import decoder_bindings, vision_bindings
from ..base import Backend
from ..cuda.target import Cuda
from ..steps import CudaDevice
from ..target import Target
from .backend import EngineBackend
from .engines import Engines
from .kernels import digest
from .runner import Engine

_ELSEWHERE = "give the checkpoint, with --device cuda"


class TensorRt(Target):
    """A package of ``avl-edge build`` with its engines; it brings along what is read of the model beside them."""

    cannot_give_back = Cuda.cannot_give_back
    cannot_bound_memory = (
        "what an engine takes is known once it is loaded, so that the memory of a process with one cannot be bounded "
        "before: give a KV budget, or the checkpoint with --device cuda"
    )
    library_bytes = Cuda.library_bytes
    runs_prompts_whole = True

    packs_weights = False

    def __init__(self, directory: Path) -> None:
        """Raises :class:`~avl_edge.package.engine.BadPackage` where ``directory`` holds no package for this machine and
        version, and :class:`~avl_edge.attention.cuda.NoCuda` without a GPU."""
        self._package = directory
        with open_package(directory, files=MODEL_FILES) as package:
            self._job = Job.of_package(package, Platform.of(probe(), digest()))
            self._built = package.manifest
        super().__init__(self._job.directory)
        self.most_rows = self._job.recipe.pool_rows
        self._gpu = CudaDevice()

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._job.settings.precision)
        return dtype

    def check_prompt(self, prompt: PromptShape, spec: ModelSpec, what: str = "prompt") -> None:  # noqa: ARG002
        recipe = self._job.recipe
        images = recipe.images * self._job.spec.tokens_per_image
        fits = prompt.length <= recipe.prompt_tokens and prompt.images <= images
        require(
            fits,
            f"the {what} takes {prompt.length} tokens, {prompt.images} of images, but the package was built for "
            f"{recipe.prompt_tokens} and {recipe.images} images: ask for less, or build it for more",
        )

    def check(self, choice: Choice, prompt: PromptShape, spec: ModelSpec) -> None:
        method, formats = choice
        precision = self._job.settings.precision
        served = decoder_formats(self._job.spec, precision)
        others = ", ".join(sorted(set(formats.by_tier().values()) - set(served)))
        message = f"this package's engine, of {precision}, reads {', '.join(served)} rows, not {others}"
        require(not others, f"{message}: give other formats, or {_ELSEWHERE}")
        policy = method.policy(prompt, spec.text.layers)
        require(
            not policy.picks_core(1),
            f"{method.name} picks rows within a step, which an engine cannot: take another method, or {_ELSEWHERE}",
        )
        for layer in range(spec.text.layers - 1):  # beyond the last one there is nothing left to prune for
            prune = policy.prunes(layer)
            require(
                prune is None or (layer == self._job.settings.prune_after and prune.by == "last" and not prune.each),
                f"{method.name} prunes after layer {layer}, by what the package cannot: {self._can_prune()}",
            )

    def _can_prune(self) -> str:
        layer = self._job.settings.prune_after
        if layer is None:
            return "it was built with prune_after never; build it with another, or prune nothing"
        return f"it prunes after layer {layer}, by the last token's attention"

    def load(
        self,
        spec: ModelSpec,  # noqa: ARG002
        shape: KvShape,
        pages: int,
        progress: Progress | None,
        recorded_steps: Entry,
    ) -> Backend:
        job, device = self._job, self._gpu.device
        vision = vision_bindings(job.spec, job.settings.precision)
        decoder = decoder_bindings(job.spec, job.settings.precision, job.settings.prune_after)
        wanted = {VISION_ENGINE: vision, DECODER_ENGINE: decoder}
        opened = []
        with open_package(self._package, files=wanted) as package:
            require(package.manifest == self._built, f"{self._package} was built anew meanwhile: open it again")
            for done, (name, bindings) in enumerate(wanted.items()):
                opened.append(Engine.open(package[name], bindings))
                if progress:
                    progress(done + 1, len(wanted))
        store = RowStore(pages, shape, self.dtype, str(device))
        engines = Engines(job.spec, job.recipe, opened[0], vision, opened[1], decoder)
        backend = EngineBackend(engines, store, self._gpu, recorded_steps)
        backend.require_rows()
        return backend
