"""A model's small files, read and checked: all that a runtime is opened with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..backends.target import Target
from ..backends.targets import open_target
from ..errors import BadModel
from ..model.demo import DEMO
from ..model.families import read_spec
from ..model.prompt import Processor
from ..model.spec import ModelSpec
from ..model.weight_format import WeightFormats


@dataclass(frozen=True)
class ModelFiles:
    """``target``: where the model runs; ``processor``: what stands between a person and it."""

    name: str
    target: Target
    spec: ModelSpec
    processor: Processor

    @classmethod
    def read(cls, model: str | os.PathLike[str], device: str | None, packed: WeightFormats) -> ModelFiles:
        """Of "demo", or of a directory, to run on ``device`` with its decoder ``packed``; raises what is wrong with
        them."""
        given = DEMO if model == "demo" else Path(model)
        if not os.fspath(model) or not os.path.isdir(given):
            raise BadModel(f"there is no model {os.fspath(model)!r}: give 'demo' or the directory of a checkpoint")
        target = open_target(given, device, packed)
        spec = read_spec(target.directory)
        packed.check(spec.text)
        target.check_model(spec)
        name = "demo" if model == "demo" else given.resolve().name
        return cls(name, target, spec, Processor.of(spec, target.directory))
