"""A target: a device, and the model that is meant to run there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import KvShape, Picture, Progress, PromptShape
from ..errors import BadInput
from ..files import read_json
from ..kv.methods import Choice
from ..machine.ledger import Entry
from ..model import checkpoint
from ..model.families import read_spec
from ..model.sizes import ModelShape
from ..model.spec import ModelSpec
from ..model.weight_format import WeightFormats, stored_formats
from .base import Backend


class Target(ABC):
    """A device, and the model in ``directory`` that is meant to run there.

    Opening one reads small files only. What it cannot do is refused, as :class:`BadInput`, before anything is loaded.
    """

    most_rows: int | None = None
    """Of a pool; None where its memory is the only bound."""
    runs_prompts_whole = False
    """Whether nobody else's step fits between two layers of a prompt."""
    threads: int | None = None
    """Of the processor, for decode steps there; None: as many as torch uses."""
    cannot_give_back: str | None = None
    """Why rows cannot give memory back while requests run; None where they can."""
    cannot_bound_memory: str | None = None
    """Why the memory of the process cannot be bounded before the weights are loaded; None where it can."""
    library_bytes = 96 * 2**20
    """What libraries take beside tensors once they compute. On a CPU (x86, torch 2.x, resident memory): 17 MiB of their
    code that is read with its first use, 25 MiB of compiled kernels and of freed blocks below a MiB, which the C
    library keeps, and as much again in reserve, for threads and other processors."""
    recorded_steps_bytes = 0
    """The most that recorded decode steps hold, where the memory of the process is bounded."""

    packs_weights = True
    """Whether a checkpoint's matrices are packed here as they are loaded."""
    packed = WeightFormats()
    """What they are to be packed in."""

    def __init__(self, directory: Path) -> None:
        """Raises what is wrong with the device or the model's files."""
        self.directory = directory

    @property
    def weight_formats(self) -> WeightFormats:
        """Of the decoder's matrices as they will lie in memory."""
        stored = stored_formats(read_json(self.directory / "config.json") or {})
        return self.packed if stored == WeightFormats() else stored

    @property
    def dtype(self) -> torch.dtype:
        """That of exact rows."""
        return checkpoint.stored_dtype(self.directory, read_spec(self.directory).prefixes)

    def check_model(self, spec: ModelSpec) -> None:  # noqa: B027
        """Raise :class:`BadInput` for a model that does not run here, whatever it is asked."""

    def check_prompt(self, prompt: PromptShape, spec: ModelSpec, what: str = "prompt") -> None:  # noqa: B027
        """Raise :class:`BadInput` for tokens that are too many to be run at once here, whatever the method; ``what``
        they are."""

    def check(self, choice: Choice, prompt: PromptShape, spec: ModelSpec) -> None:  # noqa: B027
        """Raise :class:`BadInput` for a method or formats that are not served here."""

    def serves(self, choice: Choice, prompt: PromptShape, spec: ModelSpec) -> bool:
        """Whether :meth:`check` takes it."""
        try:
            self.check(choice, prompt, spec)
        except BadInput:
            return False
        return True

    def weight_bytes(self, model: ModelShape) -> int:
        """What the weights of ``model`` take here."""
        return model.weight_bytes(model.stored) + model.float32_scale_bytes(model.stored)

    def workspace_bytes(self, model: ModelShape, pictures: Sequence[Picture], tokens: int, image_tokens: int) -> int:
        """What a prompt of so many tokens takes here while it and its pictures run."""
        return model.workspace_bytes(pictures, tokens, image_tokens)

    @abstractmethod
    def load(
        self, spec: ModelSpec, shape: KvShape, pages: int, progress: Progress | None, recorded_steps: Entry
    ) -> Backend:
        """Read the weights and reserve the rows of a pool of ``pages``; steps that are recorded are counted under
        ``recorded_steps``."""
