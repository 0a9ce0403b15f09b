"""A small random Qwen-VL: its configuration, its weights by their names, its vocabulary, and prompts."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.equipment.checkpoints import random_image

EDGE, QUERIES = 280, 256
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""By which the public code cuts a text."""


def ranks() -> dict[bytes, int]:
    """Bytes, then pairs in the order in which they are merged."""
    tokens = [bytes([each]) for each in range(256)]
    for word in (b"in", b"er", b" t", b" a", b"he", b" the", b"re", b"pi", b"pic", b"tu", b"ture", b"is", b"\n\n"):
        tokens.append(word)
    return {token: rank for rank, token in enumerate(tokens)}


_SPECIAL = len(ranks())
CONFIG: dict[str, Any] = {
    "model_type": "qwen",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "intermediate_size": 320,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "use_flash_attn": False,
    "fp32": True,
    "vocab_size": _SPECIAL + 230,
    "visual": {
        "heads": 4,
        "image_size": EDGE,
        "image_start_id": _SPECIAL + 214,
        "layers": 3,
        "mlp_ratio": 2.5,
        "output_dim": 128,
        "patch_size": 14,
        "width": 64,
    },
}
PROMPTS: dict[str, tuple[Sequence[int], str]] = {
    "one": ([1], "What is in the picture?"),
    "two": ([2, 1], "How do the two pictures differ?"),
    "none": ([], "Why is the sky blue?"),
}
"""By name: seeds of pictures, and a question."""


def draw(name: str, shape: Sequence[int]) -> Tensor:
    """A tensor's values by its name."""
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(tuple(shape), generator=rng)
    if ".ln_" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.2 * noise
    if "pos" in name or "query" in name or "wte" in name:
        return 0.5 * noise
    gain = 1.5 if "c_attn" in name or "in_proj" in name else 1.0
    return gain / math.sqrt(shape[0] if name.endswith("proj") else noise[0].numel()) * noise


def picture(seed: int) -> Image.Image:
    return random_image(seed, (90 + 20 * seed, 70))


def picture_values(seed: int) -> npt.NDArray[np.float32]:
    """As the code makes them: ``[3, edge, edge]``."""
    square = picture(seed).convert("RGB").resize((EDGE, EDGE), Image.Resampling.BICUBIC)
    values = np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)[:, None, None]
    std = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)[:, None, None]
    found: npt.NDArray[np.float32] = (values - mean) / std
    return found


def encoded(text: str) -> list[int]:
    """By tiktoken, as the code does."""
    return tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={}).encode(text)


def prompt_ids(name: str) -> list[int]:
    """By the documented layout."""
    pictures, question = PROMPTS[name]
    start, end, opening = _SPECIAL + 1, _SPECIAL + 2, _SPECIAL + 214
    shown: list[int] = []
    for number, _ in enumerate(pictures, 1):
        places = [opening + 2] * QUERIES
        shown += [*encoded(f"Picture {number}: "), opening, *places, opening + 1, *encoded("\n")]
    system = [start, *encoded("system"), *encoded("\n"), *encoded("You are a helpful assistant."), end, *encoded("\n")]
    user = [start, *encoded("user"), *encoded("\n"), *shown, *encoded(question), end, *encoded("\n")]
    return [*system, *user, start, *encoded("assistant"), *encoded("\n")]


def write_checkpoint(directory: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """A checkpoint with tensors of these names and shapes."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": _SPECIAL, "chat_format": "chatml"}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks().items()]
    (directory / "qwen.tiktoken").write_text("".join(lines))
    save_file({name: draw(name, shape).contiguous() for name, shape in shapes.items()}, directory / "model.safetensors")
    return directory
