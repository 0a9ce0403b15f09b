"""The targets by name. To add one: write `NAME/target.py`, name its class here."""

from __future__ import annotations

from pathlib import Path

from ..config import require
from ..errors import BadInput
from ..model.weight_format import WeightFormats
from ..package.directory import is_package
from .cpu.target import Cpu
from .cuda.target import Cuda
from .target import Target
from .tensorrt.target import TensorRt

TARGETS: dict[str, type[Target]] = {"cpu": Cpu, "cuda": Cuda, "tensorrt": TensorRt}
"""By the name that people give as the device."""

__all__ = ["TARGETS", "Target", "open_target"]


def open_target(directory: Path, device: str | None, packed: WeightFormats | None = None) -> Target:
    """Where the model in ``directory`` runs: on ``device``, or on that which it is made for, its decoder ``packed``.

    Raises :class:`BadInput` for a device that is not known or that does not run such a model, and what opening it
    raises.
    """
    built = is_package(directory)
    name = ("tensorrt" if built else "cpu") if device is None else device
    if name not in TARGETS:
        raise BadInput(f"there is no device {name!r}: choose one of {', '.join(TARGETS)}")
    require(
        not built or name == "tensorrt",
        f"{directory} is a package, whose engines run with --device tensorrt: for {name} give the checkpoint",
    )
    require(
        built or name != "tensorrt",
        f"{directory} is no package: build one with avl-edge build {directory} --out PACKAGE, and give that",
    )
    target = TARGETS[name](directory)
    if packed is not None and packed != WeightFormats():
        require(target.packs_weights, f"the weights of {directory} are as it was built: leave out --weights and --head")
        target.packed = packed
    return target
