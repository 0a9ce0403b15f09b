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
    InternVLConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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
    "qwen2_vl": Family("qwen2_vl", 31, {"num_key_value_heads": 2}, decoder="qwen2"),
    "qwen2_vl-tied": Family("qwen2_vl", 32, {"num_key_value_heads": 1}, tied=True, decoder="qwen2"),
    "qwen2_vl-mha": Family("qwen2_vl", 33, vision={"depth": 1, "mlp_ratio": 3}, decoder="qwen2"),
    "qwen2_5_vl": Family("qwen2_5_vl", 34, {"num_key_value_heads": 2}, decoder="qwen2"),
    "qwen2_5_vl-tied": Family(
        "qwen2_5_vl", 35, {"num_key_value_heads": 1}, {"window_size": 84, "depth": 4}, tied=True, decoder="qwen2"
    ),
    "qwen2_5_vl-mha": Family("qwen2_5_vl", 36, vision={"fullatt_block_indexes": [0, 2]}, decoder="qwen2"),
    "qwen3_vl": Family("qwen3_vl", 37, {"num_key_value_heads": 2}, decoder="qwen3"),
    "qwen3_vl-tied": Family(
        "qwen3_vl", 48, {"num_key_value_heads": 1, "head_dim": 24}, {"depth": 4}, tied=True, decoder="qwen3"
    ),
    "qwen3_vl-mha": Family(
        "qwen3_vl", 39, vision={"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 49}, decoder="qwen3"
    ),
    "internvl-qwen2": Family("internvl", 41, {"num_key_value_heads": 2}, decoder="qwen2"),
    "internvl-qwen3": Family(
        "internvl", 52, {"head_dim": 16}, {"norm_type": "rms_norm", "use_qk_norm": True}, decoder="qwen3"
    ),
    "internvl-tied": Family(
        "internvl", 43, {"num_key_value_heads": 1}, {"use_mean_pooling": False}, tied=True, decoder="qwen2"
    ),
    "internvl-llama": Family("internvl", 44, config={"vision_feature_layer": -2}),
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
def make_family(directory: Path, family: Family, dtype: torch.dtype = torch.float32) -> Path:
    """Write model, tokenizer and processor into ``directory``."""
    tokenizer = make_tokenizer(family.byte_level)
    config = _CONFIGS[family.kind](family, tokenizer)
    model = AutoModelForImageTextToText.from_config(config).eval()
    _draw(model, family)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    directory.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(directory)
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
        elif "lambda" in name:
            value = 0.5 + 0.1 * noise
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


# --- the Qwens ---

_QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
_QWEN_VISION: dict[str, Any] = {"depth": 3, "num_heads": 2, "hidden_size": 32}
_QWEN_PATCHES = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}


def _qwen_config(family: Family, tokenizer: PreTrainedTokenizerFast) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": _QWEN_TOKENS})
    head_dim = family.text.get("head_dim", 16)
    sections = [head_dim // 2 - 2 * (3 * head_dim // 16), 3 * head_dim // 16, 3 * head_dim // 16]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    text = {**_TEXT, "rope_parameters": rope, "tie_word_embeddings": family.tied, **family.text}
    vision = {**_QWEN_VISION, "patch_size": _QWEN_PATCHES[family.kind], "out_hidden_size": text["hidden_size"]}
    if family.kind == "qwen2_vl":
        vision |= {"embed_dim": vision["hidden_size"], "mlp_ratio": 2, "hidden_size": text["hidden_size"]}
        del vision["out_hidden_size"]
        kind: Any = Qwen2VLConfig
    elif family.kind == "qwen2_5_vl":
        vision |= {"intermediate_size": 48, "window_size": 56, "fullatt_block_indexes": [1]}
        kind = Qwen2_5_VLConfig
    else:
        vision |= {"intermediate_size": 48, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 36}
        text["head_dim"] = head_dim
        kind = Qwen3VLConfig
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in zip(("vision_start", "vision_end", "image", "video"), _QWEN_TOKENS[:4], strict=True)
    }
    return kind(
        text_config=text, vision_config=vision | family.vision, tie_word_embeddings=family.tied, **ids, **family.config
    )


def _save_qwen(family: Family, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    edge = 2 * _QWEN_PATCHES[family.kind]
    Qwen2VLImageProcessorPil(
        min_pixels=4 * edge**2, max_pixels=20 * edge**2, patch_size=_QWEN_PATCHES[family.kind]
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _qwen_inputs(directory: Path, images: Sequence[Image.Image], prompt: str) -> Inputs:
    """By the picture processor that needs no torchvision, and the documented layout."""
    given = Qwen2VLImageProcessorPil.from_pretrained(directory)(images=list(images), return_tensors="pt")
    grids = given["image_grid_thw"]
    counts = (grids.prod(1) // 4).tolist()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    placed = "".join("<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in counts)
    text = f"<|im_start|>user\n{placed}{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    pixels = [part.numpy() for part in given["pixel_values"].split(grids.prod(1).tolist())]
    return Inputs(ids[0].tolist(), pixels, {"input_ids": ids, "mm_token_type_ids": types, **given})


# --- InternVL ---

_INTERNVL_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"]


def _internvl_config(family: Family, tokenizer: PreTrainedTokenizerFast) -> InternVLConfig:
    tokenizer.add_special_tokens({"additional_special_tokens": _INTERNVL_TOKENS})
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": [56, 56], "patch_size": [14, 14], "attention_bias": True, **family.vision}
    return InternVLConfig(
        vision_config=vision,
        text_config=kinds[family.decoder](**{**_TEXT, "tie_word_embeddings": family.tied, **family.text}),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=family.tied,
        **family.config,
    )


def _save_internvl(family: Family, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:  # noqa: ARG001
    GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=True).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _internvl_inputs(directory: Path, images: Sequence[Image.Image], prompt: str) -> Inputs:
    """By the picture processor that needs no torchvision, and the documented layout."""
    given = GotOcr2ImageProcessorPil.from_pretrained(directory)(images=list(images), return_tensors="pt")
    counts = given["num_patches"].tolist()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    placed = "".join("<img>" + "<IMG_CONTEXT>" * (4 * count) + "</img>\n" for count in counts)
    text = f"<|im_start|>user\n{placed}{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    pixels = [part.numpy() for part in given["pixel_values"].split(counts)]
    return Inputs(ids[0].tolist(), pixels, {"input_ids": ids, "pixel_values": given["pixel_values"]})


_QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_CONFIGS: dict[str, Any] = dict.fromkeys(_QWENS, _qwen_config) | {
    "llava_next": _llava_next_config,
    "internvl": _internvl_config,
}
_PROCESSORS: dict[str, Any] = dict.fromkeys(_QWENS, _save_qwen) | {
    "llava_next": _save_llava_next,
    "internvl": _save_internvl,
}
_INPUTS: dict[str, Any] = dict.fromkeys(_QWENS, _qwen_inputs) | {
    "llava_next": _llava_next_inputs,
    "internvl": _internvl_inputs,
}
