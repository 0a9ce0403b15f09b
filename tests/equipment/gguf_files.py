"""Small random decoders as GGUF files, written by the package ``gguf``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.equipment.checkpoints import BOS, EOS, TOKENIZER_SIZE, UNK, make_tokenizer

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 3, 4, 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # gguf.TokenType


def write_decoder(gguf: Any, path: Path, architecture: str, *, tied: bool = False, extra: str | None = None) -> Path:
    """A decoder of ``architecture``, qwen2 or llama, its matrices in Q8_0; ``extra`` names one more tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(TOKENIZER_SIZE)
    _add_tokenizer(writer, architecture)
    for name, values in _tensors(architecture, tied):
        if values.ndim == 1:
            writer.add_tensor(name, values)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    if extra:
        writer.add_tensor(extra, np.ones(HIDDEN // HEADS // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, architecture: str) -> None:
    tokenizer = make_tokenizer(architecture)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = tokenizer.get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2" if architecture == "qwen2" else "llama")
    writer.add_token_list(pieces)
    writer.add_token_types([_token_type(piece, special) for piece in pieces])
    writer.add_token_scores([-float(index) for index in range(len(pieces))])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(vocabulary[BOS])
    writer.add_eos_token_id(vocabulary[EOS])
    writer.add_unk_token_id(vocabulary[UNK])


def _token_type(piece: str, special: set[str]) -> int:
    if piece == UNK:
        return _UNKNOWN
    if piece in special:
        return _CONTROL
    return _BYTE if piece.startswith("<0x") else _NORMAL


def _tensors(architecture: str, tied: bool) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(5)
    kv = HIDDEN // HEADS * KV_HEADS

    def drawn(*shape: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return drawn(rows, columns, scale=1.5 * columns**-0.5)

    yield "token_embd.weight", drawn(TOKENIZER_SIZE, HIDDEN, scale=0.1 if tied else 0.5)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            yield f"{block}.{name}.weight", 1 + drawn(HIDDEN, scale=0.1)
        for name, rows in (("attn_q", HIDDEN), ("attn_k", kv), ("attn_v", kv)):
            yield f"{block}.{name}.weight", matrix(rows, HIDDEN)
            if architecture == "qwen2":
                yield f"{block}.{name}.bias", drawn(rows)
        yield f"{block}.attn_output.weight", matrix(HIDDEN, HIDDEN)
        for name, rows, columns in (
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):
            yield f"{block}.{name}.weight", matrix(rows, columns)
    yield "output_norm.weight", 1 + drawn(HIDDEN, scale=0.1)
    if not tied:
        yield "output.weight", matrix(TOKENIZER_SIZE, HIDDEN)
