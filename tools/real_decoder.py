"""A checkpoint for evaluation from a GGUF file: a pretrained decoder inside LLaVA-1.5.

    pip install gguf
    python -m tools.real_decoder qwen2.5-coder-0.5b-instruct-q6_k.gguf real-decoder --dtype float32
    avl-edge eval --model real-decoder --data text:LICENSE --methods full,full:format=int8

Formats of rows and methods are judged on weights that were trained on real text, of a Qwen2 or LLaMA decoder. The
package ``gguf`` reads and dequantises the file, transformers translates its config and its tokenizer. The vision tower
and the projector are small and random: pictures are read, and mean nothing. ``<image>`` becomes one more token; as in
the published checkpoints the embedding and the head are padded to a multiple of 64 rows, here with zeros.

One tensor is held at a time, and one file's worth of what is to be written.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from avl_edge.config import require
from avl_edge.errors import AvlEdgeError, BadInput

ARCHITECTURES = ("llama", "qwen2")
IMAGE = "<image>"
IMAGE_SIZE, PATCH_SIZE = 336, 14  # 576 tokens a picture, as LLaVA-1.5 has
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 1 << 30

_MAGIC = b"GGUF"
_TOKENS = "tokenizer.ggml.tokens"
_TEXT = "model.language_model."
_VOCABULARY_MULTIPLE = 64
_VISION_STD = 0.02  # what LLaVA and CLIP begin their training with


class GgufDecoder:
    """The tensors of a decoder in the GGUF file ``path``, under the names of transformers' causal language models.

    Raises :class:`BadInput` for what is not one whole file of a supported architecture.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._gguf = import_module("gguf")
        except ImportError:
            raise BadInput("reading a GGUF file needs the package gguf: pip install gguf") from None
        reader = self._open(path)
        self.path = path
        self.architecture = _field(reader, "general.architecture")
        require(
            self.architecture in ARCHITECTURES,
            f"{path} holds a model of the architecture {self.architecture!r}: only {', '.join(ARCHITECTURES)} are read",
        )
        parts = _field(reader, "split.count") or 1
        require(parts == 1, f"{path} is one of {parts} parts: join them with llama-gguf-split --merge")
        scaling = _field(reader, f"{self.architecture}.rope.scaling.type") or "none"
        require(scaling == "none", f"{path} scales its positions ({scaling}), which is not read")
        for key in (f"{self.architecture}.block_count", f"{self.architecture}.attention.head_count", _TOKENS):
            require(_field(reader, key) is not None, f"{path} has no {key}: is it a complete model?")
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self._gguf.MODEL_ARCH[self.architecture.upper()]
        self._names = self._gguf.get_tensor_name_map(architecture, _field(reader, f"{self.architecture}.block_count"))
        self._heads = _field(reader, f"{self.architecture}.attention.head_count")
        self._kv_heads = _field(reader, f"{self.architecture}.attention.head_count_kv") or self._heads

    def _open(self, path: Path) -> Any:
        try:
            with path.open("rb") as file:
                magic = file.read(len(_MAGIC))
            require(magic == _MAGIC, f"{path} is not a GGUF file")
            return self._gguf.GGUFReader(path)
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror})") from None
        except (ValueError, IndexError, KeyError) as error:
            raise BadInput(f"{path} is damaged or cut off; copy it again ({error})") from None

    def __contains__(self, name: str) -> bool:
        return self._name(name) in self._tensors

    def take(self, name: str) -> Tensor:
        """The tensor ``name``, float32, and gone from here; :class:`BadInput` where there is none."""
        stored = self._tensors.pop(self._name(name), None)
        if stored is None:
            raise BadInput(f"{self.path} has no tensor for {name}: is it a complete model?")
        values = torch.from_numpy(np.array(self._gguf.dequantize(stored.data, stored.tensor_type), dtype=np.float32))
        if self.architecture == "llama" and ".self_attn.q_proj." in name:
            return _halves(values, self._heads)
        if self.architecture == "llama" and ".self_attn.k_proj." in name:
            return _halves(values, self._kv_heads)
        return values

    def check_empty(self) -> None:
        """:class:`BadInput` for tensors that nobody took: the model would compute without them."""
        left = ", ".join(sorted(self._tensors))
        require(not left, f"{self.path} has tensors that the {self.architecture} of transformers does not: {left}")

    def _name(self, name: str) -> str:
        return str(self._names.get_name(name, try_suffixes=(".weight", ".bias")))


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _halves(values: Tensor, heads: int) -> Tensor:
    """``[heads * d, ...]`` whose rows RoPE turns in neighbouring pairs, as llama.cpp has them, to rows whose pairs are
    half a head apart, as transformers has them."""
    return values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def make_checkpoint(gguf: Path, directory: Path, dtype: torch.dtype, seed: int = 0) -> None:
    """Write the decoder of ``gguf`` as a LLaVA-1.5 checkpoint of ``dtype`` into ``directory``, new or empty.

    ``seed`` draws the vision tower and the projector.
    """
    require(
        not directory.exists() or (directory.is_dir() and not any(directory.iterdir())),
        f"{directory} is there already: give a folder that is new or empty",
    )
    decoder = GgufDecoder(gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = _llava(text, tokenizer, tied="lm_head.weight" not in decoder)
    config.dtype = dtype
    config.architectures = [LlavaForConditionalGeneration.__name__]
    generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
        staged = Path(scratch) / "checkpoint"
        staged.mkdir()
        _write(staged, _weights(decoder, config, seed), dtype)
        decoder.check_empty()
        for part in (config, generation, _processor(tokenizer)):
            part.save_pretrained(staged)
        staged.replace(directory)


def _llava(text: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, tied: bool) -> LlavaConfig:
    """The config around that of the decoder; adds ``<image>`` to ``tokenizer``."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    vocabulary = max(text.vocab_size, len(tokenizer))
    text.vocab_size = -(-vocabulary // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    text.tie_word_embeddings = tied
    text.name_or_path = ""  # not the folder that the GGUF file was read from
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )


def _processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def _weights(decoder: GgufDecoder, config: LlavaConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of every parameter that transformers' LLaVA of ``config`` has."""
    with torch.device("meta"):
        shapes = dict(LlavaForConditionalGeneration(config).named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in shapes.items():
        if name.startswith(_TEXT) or name == "lm_head.weight":
            yield name, _padded(decoder.take(name.replace(_TEXT, "model.")), parameter.shape, name, decoder.path)
        elif name.endswith("bias"):
            yield name, torch.zeros(parameter.shape)
        elif "norm" in name:
            yield name, torch.ones(parameter.shape)
        else:
            yield name, _VISION_STD * torch.randn(parameter.shape, generator=generator)


def _padded(values: Tensor, shape: torch.Size, name: str, path: Path) -> Tensor:
    """``values`` with rows of zeros up to the padded vocabulary of the embedding and the head."""
    if name.endswith(("embed_tokens.weight", "lm_head.weight")) and len(values) < shape[0]:
        values = torch.cat([values, values.new_zeros(shape[0] - len(values), *shape[1:])])
    require(
        values.shape == shape, f"{path} has {name} of shape {list(values.shape)}, its config asks for {list(shape)}"
    )
    return values


def _write(directory: Path, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """``weights`` as ``dtype`` into files of about :data:`SHARD_BYTES`, with their index."""
    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = written = 0

    def flush() -> None:
        name = f"model-{len(set(files.values())) + 1:05}.safetensors"
        save_file(shard, directory / name, {"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in weights:
        shard[name] = tensor.to(dtype)
        total += shard[name].nbytes
        if total - written >= SHARD_BYTES:
            flush()
            written = total
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def main(
    gguf: Annotated[Path, typer.Argument(help="The GGUF file of a Qwen2 or LLaMA decoder.")],
    directory: Annotated[Path, typer.Argument(help="The folder of the checkpoint, new or empty.")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="What the weights are stored in.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Draws the vision tower and the projector.")] = 0,
) -> None:
    """Make a LLaVA-1.5 checkpoint for evaluation from a pretrained decoder."""
    make_checkpoint(gguf, directory, DTYPES[dtype], seed)


if __name__ == "__main__":
    try:
        typer.run(main)
    except AvlEdgeError as error:
        typer.echo(f"real_decoder: {error}", err=True)
        sys.exit(error.exit_code)
