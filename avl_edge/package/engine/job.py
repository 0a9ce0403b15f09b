"""``avl-edge build``: a checkpoint to a package."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from ...config import Progress, format_size
from ...errors import BadModel
from ...machine.device import probe
from ...model.checkpoint import stored_dtype
from ...model.families import read_spec
from ...model.families.llava import LlavaSpec
from ..export import (
    DECODER,
    PLUGIN_DECODER,
    PRECISIONS,
    VISION,
    ExportPlan,
    Settings,
    decoder_bindings,
    export_model,
    plan_export,
    vision_bindings,
)
from .decoder import Plugin, decoder_profiles
from .errors import BadPackage, BadRecipe, BuildFailed, rebuild
from .fingerprint import Fingerprint, Platform, checkpoint_digest, model_files, require_match
from .manifest import Manifest
from .recipe import STORED, Recipe
from .store import Package, open_package, publish
from .tensorrt import build_engine, find_tensorrt

VISION_ENGINE, DECODER_ENGINE, TIMINGS = "vision.engine", "decoder.engine", "timing.cache"
_LARGEST = 2**31 - 1
"""Elements of a tensor that TensorRT takes for sure."""


@dataclass(frozen=True)
class Job:
    """What a build would do, known from config.json and file headers alone. Sizes in bytes."""

    directory: Path
    spec: LlavaSpec
    recipe: Recipe
    settings: Settings
    plan: ExportPlan

    @classmethod
    def of(cls, directory: Path, recipe: Recipe) -> Job:
        """Check the checkpoint in ``directory`` against ``recipe``; :class:`BadModel` names what does not fit."""
        if not os.path.isdir(directory):  # unlike Path.is_dir, also where a parent cannot be entered
            raise BadModel(f"there is no model {str(directory)!r}: give 'demo' or the directory of a checkpoint")
        spec = read_spec(directory)
        if not isinstance(spec, LlavaSpec):
            raise BadModel(f"{directory} is no LLaVA-1.5, the one family that is built: run the checkpoint itself")
        rows = _LARGEST // (spec.text.kv_heads * spec.text.head_dim)
        recipe = replace(
            recipe,
            prompt_tokens=min(recipe.prompt_tokens, spec.text.context),
            pool_rows=min(recipe.pool_rows, rows),
        )
        precision = _stored_precision(directory) if recipe.precision == STORED else recipe.precision
        # Beyond the last layer there is nothing left to prune for.
        layer = recipe.prune_after
        settings = Settings(precision, None if layer == "never" or layer >= spec.text.layers - 1 else layer)
        return cls(directory, spec, recipe, settings, plan_export(spec, settings))

    @property
    def export_memory(self) -> int:
        """Derived: the largest tensor as it is read and as it is written."""
        return 2 * self.plan.largest

    @property
    def engine_memory(self) -> int:
        """Derived: while the largest engine is built, its weights lie in memory as read and as laid out."""
        return 2 * max(self.plan.weights.values())

    @property
    def run_memory(self) -> int:
        """Derived: all weights, and every layer's keys and values of the longest prompt."""
        dtype: torch.dtype = getattr(torch, self.settings.precision)
        row = self.spec.text.kv_shape(dtype.itemsize).row_bytes
        return self.plan.bytes + self.spec.text.layers * row * self.recipe.prompt_tokens

    def to_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        return {
            "precision": self.settings.precision,
            "prune_after": self.settings.prune_after,
            "shapes": self.recipe.shapes,
            "weights_bytes": self.plan.weights,
            "disk_bytes": self.plan.bytes,
            "export_memory_bytes": self.export_memory,
            "engine_memory_bytes": self.engine_memory,
            "run_memory_bytes": self.run_memory,
        }

    def fingerprint(self, platform: Platform | None = None) -> Fingerprint:
        """Of the graphs, and of the engines for ``platform``; reads the whole checkpoint."""
        model = checkpoint_digest(self.directory)
        return self._fingerprint(model, platform)

    def _fingerprint(self, model: str, platform: Platform | None) -> Fingerprint:
        settings = self.settings
        return Fingerprint(
            model, self.plan.digest, settings.precision, settings.prune_after, self.recipe.shapes, platform
        )

    @classmethod
    def of_package(cls, package: Package, platform: Platform) -> Job:
        """What a package was built to do, by the files of the model that it brings along: its directory is that of the
        job. :class:`BadPackage` for sizes of another version, :class:`~.errors.Mismatch` where this program or the
        machine that is ``platform`` would build another one."""
        built = package.manifest.fingerprint
        prune_after: int | Literal["never"] = "never" if built.prune_after is None else built.prune_after
        try:
            recipe = Recipe(built.precision, prune_after, **built.shapes)  # type: ignore[arg-type]
        except (TypeError, BadRecipe):
            out, version = package.directory.parent, package.manifest.version
            raise BadPackage(f"{out} was built by avl-edge {version}, for sizes unknown here: {rebuild(out)}") from None
        job = cls.of(package.directory, recipe)
        require_match(built, job._fingerprint(built.model, platform), package.directory.parent)
        return job


def _stored_precision(directory: Path) -> str:
    name = str(stored_dtype(directory)).removeprefix("torch.")
    if name not in PRECISIONS:
        raise BadModel(f"the checkpoint is stored as {name}: build with --precision {', '.join(PRECISIONS)}")
    return name


def build(
    job: Job, out: Path, version: str, progress: Progress | None = None, plugin: Plugin | None = None
) -> tuple[Manifest, bool]:
    """Build the package ``out``: the graphs, and where TensorRT is installed the engine of the vision tower and, with
    the ``plugin``, that of the decoder.

    Gives the manifest, and whether anything had to be done. ``progress`` counts tensors first, then TensorRT's steps.
    """
    trt = find_tensorrt()
    fingerprint = job.fingerprint(Platform.of(probe(), plugin.digest if plugin else None) if trt else None)
    try:
        with open_package(out, fingerprint) as package:
            return package.manifest, False
    except BadPackage:
        pass
    engines = {VISION, DECODER} if plugin else {VISION}
    _require_room(out, job.plan.bytes + (sum(job.plan.weights[name] for name in engines) if trt else 0))
    timings = _old_timings(out) if trt else b""

    def fill(staging: Path) -> Fingerprint:
        export_model(job.spec, job.directory, staging, job.settings, progress)
        for path in model_files(job.directory):
            shutil.copyfile(path, staging / path.name)
        if trt:
            _build_engines(job, trt, staging, timings, progress, plugin)
        return fingerprint

    return publish(out, version, fill), True


def _build_engines(
    job: Job, trt: ModuleType, staging: Path, timings: bytes, progress: Progress | None, plugin: Plugin | None
) -> None:
    """One after the other, as each takes the memory of its weights; the later one knows the earlier one's times."""
    workspace, precision = job.recipe.workspace_bytes, job.settings.precision
    inputs = vision_bindings(job.spec, precision).inputs
    sizes = {"I": (1, 1, job.recipe.images)}
    engine, timings = build_engine(trt, staging / VISION, inputs, [sizes], workspace, timings, progress)
    (staging / VISION_ENGINE).write_bytes(engine)
    if plugin:
        plugin.register(trt)
        inputs = decoder_bindings(job.spec, precision, job.settings.prune_after).inputs
        profiles = decoder_profiles(job.spec, job.recipe, precision)
        engine, timings = build_engine(trt, staging / PLUGIN_DECODER, inputs, profiles, workspace, timings, progress)
        (staging / DECODER_ENGINE).write_bytes(engine)
    (staging / TIMINGS).write_bytes(timings)


def _old_timings(out: Path) -> bytes:
    """The timing cache of the package that is there, also of one that no longer fits."""
    try:
        with open_package(out) as package:
            return package[TIMINGS].read_bytes()
    except BadPackage:
        return b""


def _require_room(out: Path, needed: int) -> None:
    """Refuse before the work what the disk cannot hold."""
    try:
        existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise BuildFailed(f"{out} cannot be reached ({error.strerror}): give another --out") from None
    if needed > free:
        sizes = f"{format_size(needed)}, and {format_size(free)} are free"
        raise BuildFailed(f"{out} needs {sizes}: free some space, or give another --out")
