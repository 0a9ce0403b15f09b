"""ViT-bigG over a square, and a resampler; and the tensors of the decoder by the names that decoders have here."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ....request import PixelValues
from ...checkpoint import Weights
from ...network.image_features import ImageFeatures
from ...network.layers import LayerNorm
from ...weights import Dense
from .published import QUERIES
from .spec import QwenVlSpec

EPS = 1e-6
_NAMES = {
    "ln_1.": "input_layernorm.",
    "ln_2.": "post_attention_layernorm.",
    "attn.c_proj.": "self_attn.o_proj.",
    "mlp.w1.": "mlp.up_proj.",
    "mlp.w2.": "mlp.gate_proj.",
    "mlp.c_proj.": "mlp.down_proj.",
}
_LAYER = re.compile(r"(text\.layers\.\d+\.)(.+)")


def renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of a file by its canonical name, or as several: query, key and value are one matrix there."""
    found = _LAYER.fullmatch(name)
    if found is None:
        yield name, tensor
    elif found[2].startswith("attn.c_attn."):
        kind = found[2].removeprefix("attn.c_attn.")
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{found[1]}self_attn.{part}_proj.{kind}", rows
    else:
        old = next((old for old in _NAMES if found[2].startswith(old)), "")
        yield found[1] + _NAMES.get(old, "") + found[2][len(old) :], tensor


class VisionEncoder:
    """The tower and the resampler of ``spec``."""

    def __init__(self, spec: QwenVlSpec, weights: Weights) -> None:
        size = spec.width
        self._patch = spec.patch_size
        self._embed = weights.take("vision.conv1.weight", size, 3, self._patch, self._patch)
        self._positions = stretched(weights.take("vision.positional_embedding", QUERIES, size), spec.patches)
        self._norm = LayerNorm.take(weights, "vision.ln_pre", size, EPS)
        self._blocks = [_Block(spec, weights, f"vision.transformer.resblocks.{n}") for n in range(spec.layers)]
        self._resampler = Resampler(spec, weights)

    def run(self, pixels: PixelValues, like: Tensor) -> Generator[None, None, ImageFeatures]:
        """The features of a picture; stops between two layers."""
        square = torch.from_numpy(pixels.values[None]).to(like)
        x = F.conv2d(square, self._embed, stride=self._patch).flatten(2)[0].T
        x = self._norm(x + self._positions)
        for index, block in enumerate(self._blocks):
            if index:
                yield
            x = block(x)
        return ImageFeatures(self._resampler(x))


class _Block:
    """A pre-norm layer. Query, key and value of a head stand together in their matrix."""

    def __init__(self, spec: QwenVlSpec, weights: Weights, name: str) -> None:
        size = spec.width
        self._heads = spec.heads
        self._norm1 = LayerNorm.take(weights, f"{name}.ln_1", size, EPS)
        self._norm2 = LayerNorm.take(weights, f"{name}.ln_2", size, EPS)
        self._together = weights.linear(f"{name}.attn.in_proj", 3 * size, size, bias=True)
        self._out = weights.linear(f"{name}.attn.out_proj", size, size, bias=True)
        self._up = weights.linear(f"{name}.mlp.c_fc", spec.inner, size, bias=True)
        self._down = weights.linear(f"{name}.mlp.c_proj", size, spec.inner, bias=True)

    def __call__(self, x: Tensor) -> Tensor:
        """``[patches, size]``."""
        parts = self._together(self._norm1(x)).view(len(x), self._heads, 3, -1).permute(2, 1, 0, 3)
        x = x + self._out(F.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1))
        return x + self._down(F.gelu(self._up(self._norm2(x))))


class Resampler:
    """Learned queries that read the patches by one cross-attention."""

    def __init__(self, spec: QwenVlSpec, weights: Weights) -> None:
        size, name = spec.text.hidden_size, "vision.attn_pool"
        self._heads = spec.resampler_heads
        positions = weights.take(f"{name}.pos_embed", QUERIES, size)
        self._key_positions = stretched(positions, spec.patches)
        query = LayerNorm.take(weights, f"{name}.ln_q", size, EPS)(weights.take(f"{name}.query", QUERIES, size))
        self._brought = None  # no matrix where the widths are the same
        if spec.width != size:
            self._brought = weights.linear(f"{name}.kv_proj", size, spec.width, bias=False)
        self._norm = LayerNorm.take(weights, f"{name}.ln_kv", size, EPS)
        matrices = weights.take(f"{name}.attn.in_proj_weight", 3 * size, size).chunk(3)
        biases = weights.take(f"{name}.attn.in_proj_bias", 3 * size).chunk(3)
        of_query, self._key, self._value = map(Dense, matrices, biases)
        self._query = self._in_heads(of_query(query + positions))
        self._out = weights.linear(f"{name}.attn.out_proj", size, size, bias=True)
        self._last_norm = LayerNorm.take(weights, "vision.ln_post", size, EPS)
        self._last = weights.take("vision.proj", size, size)

    def __call__(self, x: Tensor) -> Tensor:
        """``[patches, width]`` to ``[tokens, hidden]``."""
        x = self._norm(x if self._brought is None else self._brought(x))
        key, value = self._in_heads(self._key(x + self._key_positions)), self._in_heads(self._value(x))
        read = F.scaled_dot_product_attention(self._query, key, value).transpose(0, 1).flatten(1)
        return self._last_norm(self._out(read)) @ self._last

    def _in_heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), self._heads, -1).transpose(0, 1)


def stretched(positions: Tensor, edge: int) -> Tensor:
    """A square of positions ``[n, size]`` as one of ``edge`` x ``edge``, by bicubic interpolation."""
    side = int(len(positions) ** 0.5)
    if side == edge:
        return positions
    square = positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    larger = F.interpolate(square, size=(edge, edge), mode="bicubic", align_corners=False)
    return larger.flatten(2)[0].T.to(positions.dtype)
