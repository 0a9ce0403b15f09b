"""Small random checkpoints of the families beside LLaVA-1.5, written by transformers' own `save_pretrained`, and what
transformers makes of pictures and a question."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.equipment.checkpoints import CHAT_TEMPLATE, IMAGE, TOKENIZER_SIZE, VOCAB_SIZE, make_tokenizer

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Family:
    """A checkpoint: its ``kind`` is the model_type, ``text`` the changes of the decoder's configuration."""

    kind: str
    seed: int
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    decoder: str = "llama"

    @property
    def byte_level(self) -> str:
        """The kind of the tokenizer (see :func:`tests.equipment.checkpoints.make_tokenizer`)."""
        return "qwen2" if self.decoder.startswith("qwen") else self.decoder


@dataclass(frozen=True)
class Inputs:
    """What transformers makes of pictures and a question: ``pixels`` of each picture, and what its model takes."""

    token_ids: list[int]
    pixels: list[Array]
    model: dict[str, Tensor]


_GRIDS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]

SPECS: dict[str, Family] = {
    "llava_next-vicuna": Family("llava_next", 21),
    "llava_next-mistral": Family("llava_next", 22, {"num_key_value_heads": 2}, decoder="mistral"),
    "llava_next-qwen2": Family("llava_next", 23, {"num_key_value_heads": 1}, decoder="qwen2", tied=True),
    "llava_next-two-grids": Family("llava_next", 24, config={"image_grid_pinpoints": [[56, 56], [168, 168]]}),
}

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


@torch.no_grad()
def make_family(directory: Path, family: Family) -> Path:
    """Write model, tokenizer and processor into ``directory``."""
    tokenizer = make_tokenizer(family.byte_level)
    config = _CONFIGS[family.kind](family, tokenizer)
    model = AutoModelForImageTextToText.from_config(config).eval()
    _draw(model, family)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    _PROCESSORS[family.kind](family, tokenizer, directory)
    return directory


def _draw(model: Any, family: Family) -> None:
    """So that attention is far from uniform, pictures matter, and greedy tokens go on and do not repeat."""
    rng = torch.Generator().manual_seed(family.seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        if "norm" in name or "ln_q" in name or (parameter.dim() == 1 and "weight" in name):
            value = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            value = 0.2 * noise
        elif ("embed" in name and "patch" not in name) or parameter.dim() == 1:
            value = (0.05 if family.tied and "embed_tokens" in name else 0.5) * noise
        else:
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            value = gain / math.sqrt(parameter[0].numel()) * noise
        parameter.copy_(value)
    # Special tokens and ids that the tokenizer does not have are never chosen.
    model.lm_head.weight[[0, 1, 2, *range(TOKENIZER_SIZE - 2, VOCAB_SIZE)]] *= 0.01


def messages(images: Sequence[Image.Image], prompt: str) -> list[dict[str, Any]]:
    """One user turn, pictures first, as transformers takes it."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def reference_inputs(directory: Path, family: Family, images: Sequence[Image.Image], prompt: str) -> Inputs:
    """By transformers' processor."""
    return _INPUTS[family.kind](directory, images, prompt)


# --- LLaVA-1.6 ---


def _llava_next_config(family: Family, tokenizer: PreTrainedTokenizerFast) -> LlavaNextConfig:
    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    text = {**_TEXT, "tie_word_embeddings": family.tied, **family.text}
    if family.decoder == "mistral":
        text["sliding_window"] = None
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision, projection_dim=32, image_size=56, patch_size=14),
        text_config=kinds[family.decoder](**text),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=family.tied,
        **{"image_grid_pinpoints": _GRIDS, **family.config},
    )


def _save_llava_next(family: Family, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=family.config.get("image_grid_pinpoints", _GRIDS),
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(directory)


def _llava_next_inputs(directory: Path, images: Sequence[Image.Image], prompt: str) -> Inputs:
    processor = LlavaNextProcessor.from_pretrained(directory, backend="pil")
    given = processor.apply_chat_template(
        messages(images, prompt), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    config = json.loads((directory / "config.json").read_text())
    pixels = []
    for values, (height, width) in zip(given["pixel_values"], given["image_sizes"].tolist(), strict=True):
        pixels.append(values[: _tiles(config["image_grid_pinpoints"], height, width)].numpy())
    return Inputs(given["input_ids"][0].tolist(), pixels, dict(given))


def _tiles(grids: list[list[int]], height: int, width: int) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    count: int = image_size_to_num_patches([height, width], grids, 56)
    return count


_CONFIGS: dict[str, Any] = {"llava_next": _llava_next_config}
_PROCESSORS: dict[str, Any] = {"llava_next": _save_llava_next}
_INPUTS: dict[str, Any] = {"llava_next": _llava_next_inputs}
