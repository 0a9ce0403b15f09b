"""The shipped layout: transformers' ``LlavaForConditionalGeneration`` directory, written and read."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.demo_model.canvas import PATCH

# Names of a stored LLaVA checkpoint -> names of ``DemoModel``.
_RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^model\.", ""),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^vision_tower\.(embeddings|encoder)\.", "vision_tower."),
)
_UNUSED = "post_layernorm"


def own_name(stored: str) -> str:
    """The name in ``DemoModel`` of a stored parameter."""
    for pattern, replacement in _RENAMES:
        stored = re.sub(pattern, replacement, stored)
    return stored


def load_weights(directory: Path) -> dict[str, Tensor]:
    """The float32 weights of an exported directory under the names of ``DemoModel``."""
    weights: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if _UNUSED not in name:
                weights[own_name(name)] = tensor.to(torch.float32)
    patch = weights["vision_tower.patch_embedding.weight"]
    weights["vision_tower.patch_embedding.weight"] = patch.reshape(patch.shape[0], 3 * PATCH * PATCH)
    return weights
