"""Small random LLaVA-1.5 checkpoints, written by transformers' own `save_pretrained`.

The weights are drawn so that attention is far from uniform, the picture matters and greedy decoding does not
settle on one token. Special tokens and the unused ids at the end of the vocabulary get head rows close to zero:
greedy decoding never chooses them, so a run is never cut short by an end-of-sequence token.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TOKENIZER_SIZE = 400
VOCAB_SIZE = 416  # rows of the embedding: like the published checkpoints, more than the tokenizer has
UNK, BOS, EOS, PAD, IMAGE = "<unk>", "<s>", "</s>", "<pad>", "<image>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

CORPUS = (
    "USER: What is shown in this image? ASSISTANT: The image shows a small harbour with three fishing boats.",
    "USER: Describe the picture in detail. ASSISTANT: A red bicycle leans on the wall of an old bakery.",
    "USER: How many people are there? ASSISTANT: There are two people, and one of them is holding an umbrella.",
    "USER: Read the text on the sign. ASSISTANT: The sign says that the museum is open from nine until five.",
    "A chat between a curious user and an artificial intelligence assistant. The assistant answers politely.",
    "What colour is the car in front of the house, and which of the windows is open?",
    "0 1 2 3 4 5 6 7 8 9 10 20 30 45 70 90 100",
)


@dataclass(frozen=True)
class CheckpointSpec:
    """What a checkpoint looks like. `hidden` None means heads * head_dim."""

    text: Literal["llama", "mistral", "qwen2"]
    heads: int = 4
    kv_heads: int = 4
    layers: int = 4
    head_dim: int = 16
    hidden: int | None = None
    feature_layer: int | tuple[int, ...] = -2
    strategy: Literal["default", "full"] = "default"
    tied: bool = False
    attention_bias: bool = False  # Llama only; Qwen2 always has biases on q, k and v
    outliers: bool = False  # key biases tens of times the rest, in a few channels that queries hardly look at
    dtype: torch.dtype = torch.float32
    image_size: int = 56
    patch_size: int = 14
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 512
    seed: int = 0

    @property
    def hidden_size(self) -> int:
        return self.heads * self.head_dim if self.hidden is None else self.hidden

    @property
    def image_tokens(self) -> int:
        """Image tokens of one picture."""
        return (self.image_size // self.patch_size) ** 2 + (self.strategy == "full")


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

SPECS: dict[str, CheckpointSpec] = {
    "llama-mha": CheckpointSpec("llama", seed=1),
    "llama-gqa-full": CheckpointSpec("llama", kv_heads=2, feature_layer=-1, strategy="full", seed=2),
    "llama-bias": CheckpointSpec("llama", kv_heads=1, attention_bias=True, layers=5, seed=3),
    "llama-tied": CheckpointSpec("llama", tied=True, seed=4),
    "llama3-rope": CheckpointSpec("llama", kv_heads=2, rope_scaling=LLAMA3_ROPE, image_size=84, seed=5),
    "llama-features": CheckpointSpec("llama", feature_layer=(-3, -1), strategy="full", seed=14),
    "llama-linear": CheckpointSpec("llama", rope_scaling={"rope_type": "linear", "factor": 2.0}, seed=6),
    "mistral-gqa": CheckpointSpec("mistral", kv_heads=2, layers=5, image_size=84, seed=7),
    "mistral-yarn": CheckpointSpec("mistral", kv_heads=2, feature_layer=-1, rope_scaling=YARN_ROPE, seed=8),
    "mistral-wide": CheckpointSpec("mistral", heads=6, kv_heads=3, hidden=60, strategy="full", seed=9),
    "qwen2-gqa": CheckpointSpec("qwen2", kv_heads=2, seed=10),
    "qwen2-tied": CheckpointSpec("qwen2", heads=6, kv_heads=2, tied=True, feature_layer=-1, seed=11),
    "qwen2-dynamic": CheckpointSpec("qwen2", rope_scaling={"rope_type": "dynamic", "factor": 2.0}, seed=12),
    "qwen2-outliers": CheckpointSpec("qwen2", kv_heads=2, head_dim=32, outliers=True, seed=15),
    "llama-bf16": CheckpointSpec("llama", kv_heads=2, dtype=torch.bfloat16, seed=13),
}


def random_image(seed: int, size: int | tuple[int, int]) -> Image.Image:
    """A picture of coloured blocks with some noise; `size` is a side or (width, height)."""
    width, height = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (8, 8, 3))
    rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    pixels = blocks[rows[:, None], columns[None, :]] + rng.integers(-24, 25, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-pair encoding in the manner of the family: byte level for Qwen2, sentencepiece style with byte fallback
    and a leading beginning-of-sequence token for Llama and Mistral. `<image>` and `<pad>` are the last two ids."""
    byte_level = text == "qwen2"
    specials = [UNK, BOS, EOS]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE - 2 - (len(specials) if byte_level else len(specials) + 256),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
        show_progress=False,
    )
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Metaspace()
    draft.train_from_iterator(CORPUS, trainer)
    trained = json.loads(draft.to_str())["model"]
    pieces = specials + ([] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)])
    pieces += sorted(trained["vocab"], key=trained["vocab"].get)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in trained["merges"]]

    if byte_level:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=UNK, byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, vocab[BOS])]
        )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in specials])
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in (IMAGE, PAD)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNK, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def make_processor(spec: CheckpointSpec) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": spec.image_size},
            crop_size={"height": spec.image_size, "width": spec.image_size},
        ),
        tokenizer=make_tokenizer(spec.text),
        patch_size=spec.patch_size,
        vision_feature_select_strategy=spec.strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _text_config(spec: CheckpointSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    shared: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": spec.hidden_size,
        "intermediate_size": 2 * spec.hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", **(spec.rope_scaling or {})},
        "tie_word_embeddings": spec.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if spec.text == "llama":
        return LlamaConfig(**shared, head_dim=spec.head_dim, attention_bias=spec.attention_bias)
    if spec.attention_bias:
        raise ValueError("attention_bias is an option of Llama")
    if spec.text == "mistral":
        return MistralConfig(**shared, head_dim=spec.head_dim, sliding_window=None)
    if spec.hidden_size != spec.heads * spec.head_dim:
        raise ValueError("Qwen2's hidden size is heads * head_dim")
    return Qwen2Config(**shared)


def _draw_weights(model: LlavaForConditionalGeneration, spec: CheckpointSpec, special_ids: list[int]) -> None:
    rng = torch.Generator().manual_seed(spec.seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        if "norm" in name:
            value = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            value = 0.2 * noise
        elif "embed" in name and "patch" not in name:  # token, position and class embeddings
            # a tied head reads the residual stream with these rows: small ones keep it from repeating its input
            value = (0.05 if spec.tied and "embed_tokens" in name else 0.5) * noise
        else:
            # q and k are drawn wider: the logits of attention then have a deviation of about 2
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            value = gain / math.sqrt(parameter[0].numel()) * noise
        parameter.copy_(value)
    model.lm_head.weight[special_ids] *= 0.01
    for layer in model.model.language_model.layers if spec.outliers else ():
        _draw_outliers(layer.self_attn, spec, rng)


def _draw_outliers(attention: Any, spec: CheckpointSpec, rng: torch.Generator) -> None:
    """As published Qwen2 decoders have them: in a pair that turns fast, one that turns slowly, and a single channel of
    each key head."""
    half = spec.head_dim // 2
    channels = torch.tensor([1, 1 + half, half - 1, 2 * half - 1, half - 3])
    keys = attention.k_proj.bias.view(spec.kv_heads, spec.head_dim)
    keys[:, channels] = 45 * torch.randn(spec.kv_heads, len(channels), generator=rng).sign()
    for parameter in (attention.q_proj.weight, attention.q_proj.bias):
        parameter.view(spec.heads, spec.head_dim, -1)[:, channels] /= 30


@torch.no_grad()
def make_checkpoint(directory: Path, spec: CheckpointSpec, *, max_shard_size: str | int | None = None) -> Path:
    """Write model, tokenizer and processor into `directory`; with `max_shard_size` (such as "100KB") the weights
    are split into several safetensors files with an index."""
    processor = make_processor(spec)
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=spec.image_size,
            patch_size=spec.patch_size,
        ),
        text_config=_text_config(spec, tokenizer),
        image_token_index=processor.image_token_id,
        image_seq_length=spec.image_tokens,
        vision_feature_layer=list(spec.feature_layer) if isinstance(spec.feature_layer, tuple) else spec.feature_layer,
        vision_feature_select_strategy=spec.strategy,
        tie_word_embeddings=spec.tied,
    )
    model = LlavaForConditionalGeneration(config).eval()
    unused = [*tokenizer.all_special_ids, processor.image_token_id, *range(TOKENIZER_SIZE, VOCAB_SIZE)]
    _draw_weights(model, spec, sorted(set(unused)))
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    directory.mkdir(parents=True, exist_ok=True)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.to(spec.dtype).save_pretrained(directory, **sharding)
    processor.save_pretrained(directory)
    return directory
