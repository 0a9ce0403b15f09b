"""Quantised copies of a checkpoint in the layouts of other projects, packed by numpy from their documentation.

Each copy comes with a plain one of the numbers that it stands for: what transformers computes with that is what the
quantised one has to give.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Array = npt.NDArray[Any]
DECODER_MATRIX = re.compile(r".*language_model.*layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")


@dataclass(frozen=True)
class Codes:
    """A matrix ``[outputs, inputs]`` as whole numbers from 0 to 2^bits - 1, with ``scales`` and ``zeros [outputs,
    groups]``; ``group_of`` is each input's group."""

    numbers: Array
    scales: Array
    zeros: Array
    group_of: Array
    bits: int

    @property
    def values(self) -> Array:
        """float64 ``[outputs, inputs]``."""
        zeros, scales = self.zeros[:, self.group_of], self.scales.astype(np.float64)[:, self.group_of]
        return np.asarray((self.numbers.astype(np.int64) - zeros) * scales)


def round_to_nearest(
    weight: Array, bits: int, group: int, *, symmetric: bool, shuffled: np.random.Generator | None = None
) -> Codes:
    """From the smallest to the largest number of a group; float16 scales, as all of these layouts have."""
    outputs, inputs = weight.shape
    group_of = np.arange(inputs) // group
    if shuffled is not None:
        group_of = shuffled.permutation(group_of)
    lying = weight[:, np.argsort(group_of, kind="stable")].reshape(outputs, -1, group)
    most = 2**bits - 1
    if symmetric:
        scales = (np.abs(lying).max(-1) / (most // 2)).astype(np.float16)
        zeros = np.full(scales.shape, 2 ** (bits - 1), np.int64)
    else:
        low, high = np.minimum(lying.min(-1), 0), np.maximum(lying.max(-1), 0)
        scales = ((high - low) / most).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales.astype(np.float64)), 0, most).astype(np.int64)
    whole = np.rint(weight / scales.astype(np.float64)[:, group_of]) + zeros[:, group_of]
    return Codes(np.clip(whole, 0, most).astype(np.int64), scales, zeros, group_of.astype(np.int32), bits)


def words(numbers: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Numbers along ``axis`` in int32 words, number i of a word at bit ``bits * order.index(i)``."""
    per_word = 32 // bits
    places = order or tuple(range(per_word))
    numbers = np.moveaxis(numbers, axis, -1)
    missing = -numbers.shape[-1] % per_word
    numbers = np.pad(numbers, [*[(0, 0)] * (numbers.ndim - 1), (0, missing)])
    split = numbers.reshape(*numbers.shape[:-1], -1, per_word).astype(np.uint32)
    packed = np.zeros(split.shape[:-1], np.uint32)
    for bit, number in enumerate(places):
        packed |= split[..., number] << np.uint32(bits * bit)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32))


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def pack_quantized(codes: Codes) -> dict[str, Tensor]:
    parts = {
        "weight_packed": words(codes.numbers, codes.bits, 1),
        "weight_scale": _tensor(codes.scales),
        "weight_shape": torch.tensor(codes.numbers.shape),
    }
    if (codes.zeros != 2 ** (codes.bits - 1)).any():
        parts["weight_zero_point"] = words(codes.zeros, codes.bits, 0)
    if (np.diff(codes.group_of) < 0).any():
        parts["weight_g_idx"] = _tensor(codes.group_of)
    return parts


def int_quantized(codes: Codes) -> dict[str, Tensor]:
    return {"weight": _tensor((codes.numbers - 128).astype(np.int8)), "weight_scale": _tensor(codes.scales)}


def awq(codes: Codes) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(codes.numbers.T, 4, 1, order),
        "qzeros": words(codes.zeros.T, 4, 1, order),
        "scales": _tensor(codes.scales.T),
    }


def gptq(codes: Codes, *, version: int) -> dict[str, Tensor]:
    zeros = codes.zeros if version == 2 else (codes.zeros - 1) % 2**codes.bits
    return {
        "qweight": words(codes.numbers.T, codes.bits, 0),
        "qzeros": words(zeros.T, codes.bits, 1),
        "scales": _tensor(codes.scales.T),
        "g_idx": _tensor(codes.group_of),
        "bias": torch.zeros(len(codes.numbers), dtype=torch.float16),
    }


def compressed_section(bits: int, group: int, *, symmetric: bool, kind: str = "pack-quantized") -> dict[str, Any]:
    """The ``quantization_config`` of compressed-tensors for a LLaVA whose decoder's layers are quantised."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    ignore = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head"]
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignore,
    }


def quantized_copy(
    source: Path,
    out: Path,
    codes_of: Callable[[Array], Codes],
    parts_of: Callable[[Codes], dict[str, Tensor]],
    section: dict[str, Any],
) -> tuple[Path, Path]:
    """Of ``source`` with the decoder's matrices quantised, and the plain float32 one of the same numbers."""
    quantised, plain = out / "quantised", out / "plain"
    shutil.copytree(source, quantised)
    shutil.copytree(source, plain)
    packed: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        values[name] = packed[name] = tensor
        if DECODER_MATRIX.fullmatch(name):
            del packed[name]
            codes, stem = codes_of(tensor.double().numpy()), name.removesuffix(".weight")
            stored = {f"{stem}.{part}": each for part, each in parts_of(codes).items()}
            packed.update({key: each for key, each in stored.items() if key not in values or not key.endswith("bias")})
            values[name] = torch.from_numpy(codes.values).to(tensor.dtype)
    save_file(packed, quantised / "model.safetensors", {"format": "pt"})
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return quantised, plain
