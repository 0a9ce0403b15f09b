"""Families of models, a folder each; what stands outside of them asks no model which family it is of.

A folder's `__init__` has ``read(config, directory)``, from a config.json to the family's `ModelSpec`, and
``PUBLISHED``, the models that are known by name; its `network` has ``VisionEncoder(spec, weights)``. To add a family,
write its folder and name it in :data:`FAMILIES`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from ...errors import BadModel, quoted
from ...files import read_json
from ..config_fields import Fields
from ..sizes import ModelShape
from ..spec import ModelSpec

FAMILIES: dict[str, str] = {
    "llava": "avl_edge.model.families.llava",
    "llava_next": "avl_edge.model.families.llava_next",
    "qwen2_vl": "avl_edge.model.families.qwen2_vl",
    "qwen2_5_vl": "avl_edge.model.families.qwen2_5_vl",
    "qwen3_vl": "avl_edge.model.families.qwen3_vl",
    "qwen": "avl_edge.model.families.qwen_vl",
    "internvl": "avl_edge.model.families.internvl",
}
"""By ``model_type``: the package that reads and runs such checkpoints."""


def read_spec(directory: Path) -> ModelSpec:
    """The spec in ``directory/config.json``; :class:`BadModel` names the field that is missing or unsupported."""
    config = read_json(directory / "config.json")
    if config is None:
        raise BadModel(f"{directory} has no config.json: give the directory of a complete checkpoint")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise BadModel(_refusal(f"{directory}/config.json has model_type {quoted(kind)}", "auto_map" in config))
    spec: ModelSpec = import_module(FAMILIES[kind]).read(Fields(config, {}, "config.json"), directory)
    return spec


def published() -> list[ModelShape]:
    """The models that are known by name, family by family."""
    return [shape for name in dict.fromkeys(FAMILIES.values()) for shape in import_module(name).PUBLISHED]


def network_of(spec: ModelSpec) -> ModuleType:
    """The module with the ``VisionEncoder`` of a model's family. It needs torch, which a plan does not."""
    return import_module(spec.network)


def _refusal(found: str, has_own_code: bool) -> str:
    known = f"one of {', '.join(FAMILIES)}"
    if has_own_code:
        return f"{found} and needs Python code of its own (auto_map), which is never run: give {known}"
    return f"{found}, which is not supported: it must be {known}"
