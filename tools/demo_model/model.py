"""The model as it is trained: LLaVA's mathematics with the names of transformers' parameters.

It differs from ``LlavaForConditionalGeneration`` only in what makes many questions per picture fast: the picture's rows
are computed once and shared by all questions, and they are skipped in the last layer, where nobody reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo_model.canvas import GRID, PATCH
from tools.demo_model.fast import attention, rms_norm
from tools.demo_model.vocabulary import NUM_CHARACTERS, NUM_FIELDS, NUM_INDICES, NUM_OBJECTS

# Added to the score of a row that must not be seen.
FORBIDDEN = -1e4
EMBEDDING_STD = 0.5


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; the defaults are the shipped ones."""

    vocab: int = 1024
    vision_width: int = 192
    vision_layers: int = 4
    vision_heads: int = 3
    vision_ff: int = 768
    width: int = 256
    layers: int = 8
    heads: int = 4
    ff: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def image_tokens(self) -> int:
        return GRID * GRID


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _join_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]."""
    return x.transpose(1, 2).flatten(2)


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(_join_heads(attention(q, k, v)))
        return out


class VisionMLP(nn.Module):
    def __init__(self, width: int, ff: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, ff), nn.Linear(ff, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(quick_gelu(self.fc1(x)))
        return out


class VisionLayer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(c.vision_width, c.vision_heads)
        self.layer_norm1 = nn.LayerNorm(c.vision_width, eps=c.norm_eps)
        self.mlp = VisionMLP(c.vision_width, c.vision_ff)
        self.layer_norm2 = nn.LayerNorm(c.vision_width, eps=c.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VisionTower(nn.Module):
    """CLIP's vision transformer; its features are the last layer's output without the class token."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.vision_width))
        self.patch_embedding = nn.Linear(3 * PATCH * PATCH, c.vision_width, bias=False)
        self.position_embedding = nn.Embedding(c.image_tokens + 1, c.vision_width)
        self.pre_layrnorm = nn.LayerNorm(c.vision_width, eps=c.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.vision_layers))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 336, 336, 3]`` -> features ``[B, 576, vision_width]``."""
        x: Tensor = self.patch_embedding(patches(images).to(self.patch_embedding.weight.dtype))
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], 1) + self.position_embedding.weight.to(x.dtype)
        x = self.pre_layrnorm(x)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]


def patches(images: Tensor) -> Tensor:
    """uint8 ``[B, 336, 336, 3]`` -> float32 ``[B, 576, 588]`` in -1..1, each patch channel first."""
    x = images.to(torch.float32) / 127.5 - 1
    x = x.view(-1, GRID, PATCH, GRID, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(-1, GRID * GRID, 3 * PATCH * PATCH)


class Projector(nn.Module):
    """LLaVA's two-layer projector behind a fixed standardization of the features, which an export folds into it.

    LLaVA has no norm between the tower and the projector, and what all patches have in common is larger than what
    tells them apart. Without the standardization every update of the first matrix moves all picture tokens together by
    more than they differ, and reading is not discovered.
    """

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(c.vision_width, c.width), nn.Linear(c.width, c.width)
        self.register_buffer("mean", torch.zeros(c.vision_width))
        self.register_buffer("std", torch.ones(c.vision_width))
        self.mean: Tensor
        self.std: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = ((x.float() - self.mean) / self.std).to(x.dtype)
        out: Tensor = self.linear_2(F.gelu(self.linear_1(x)))
        return out

    @torch.no_grad()
    def standardize(self, features: Tensor, fresh: bool) -> None:
        """Take mean and deviation from ``features`` ``[B, N, vision_width]``.

        The function of the projector stays the same, unless it is ``fresh`` and has none yet.
        """
        if not fresh:
            self.fold()
        flat = features.float().flatten(0, 1)
        mean, std = flat.mean(0), flat.std(0) + 1e-4
        if not fresh:
            self.linear_1.bias.add_(self.linear_1.weight @ mean)
            self.linear_1.weight.mul_(std)
        self.mean.copy_(mean)
        self.std.copy_(std)

    @torch.no_grad()
    def fold(self) -> None:
        """Put the standardization into the first layer: the same function without it."""
        self.linear_1.weight.div_(self.std)
        self.linear_1.bias.sub_(self.linear_1.weight @ self.mean)
        self.mean.zero_()
        self.std.fill_(1.0)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[B, H, N, D]`` by ``cos`` and ``sin`` ``[B, 1, N, D / 2]``."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj = (nn.Linear(c.width, c.width, bias=False) for _ in range(2))
        self.v_proj, self.o_proj = (nn.Linear(c.width, c.width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, last: bool) -> Tensor:
        """``x`` is ``[B, P + T, W]``; ``mask`` ``[B, 1, T, P + T]`` is added to the scores of the last T rows.

        The first P rows are plainly causal; with ``last`` they are not computed at all.
        """
        q, k, v = (_split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        p = x.shape[1] - mask.shape[2]
        picture, text = torch.split(q, [p, mask.shape[2]], 2)
        out = attention(text, k, v, mask)
        if not last:
            out = torch.cat([attention(picture, k[:, :, :p], v[:, :, :p], causal_mask(p, x)), out], 2)
        projected: Tensor = self.o_proj(_join_heads(out))
        return projected


def causal_mask(length: int, like: Tensor) -> Tensor:
    """``[length, length]``: 0 at and before the diagonal, very negative after it."""
    return torch.full((length, length), FORBIDDEN, dtype=like.dtype, device=like.device).triu(1)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.width, c.ff, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c.ff, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.width, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, last: bool) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, last)
        x = (x[:, -mask.shape[2] :] if last else x) + attended
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """LLaMA's decoder without its output head."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps)
        half = c.width // c.heads // 2
        self.register_buffer("frequencies", c.rope_theta ** (-torch.arange(half) / half), persistent=False)
        self.frequencies: Tensor

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, active: tuple[int, ...]) -> Tensor:
        """Rows ``[B, P + T, W]`` at ``positions`` ``[B, P + T]`` -> normed states ``[B, T, W]`` of the last T rows."""
        angles = positions[:, None, :, None].float() * self.frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i in active:
            x = self.layers[i](x, cos, sin, mask, i == active[-1])
        out: Tensor = self.norm(x)
        return out


class DenseHead(nn.Module):
    """Reads the auxiliary labels off the vision features; used in training only.

    ``forward`` gives characters, fields, indices and objects of all patches; ``pieces`` the word pieces of some.
    """

    SIZES = (NUM_CHARACTERS, NUM_FIELDS, NUM_INDICES)

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c.vision_width)
        self.linear = nn.Linear(c.vision_width, 2 * sum(self.SIZES) + NUM_OBJECTS)
        self.piece_linear = nn.Linear(c.vision_width, 2 * c.vocab)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm(features))
        return out

    def pieces(self, features: Tensor) -> Tensor:
        """Logits ``[N, 2, vocab]`` of the word pieces in the halves of N patches ``[N, vision_width]``."""
        out: Tensor = self.piece_linear(self.norm(features))
        return out.view(*features.shape[:-1], 2, -1)


class DemoModel(nn.Module):
    """Vision tower, projector, decoder and output head, and the auxiliary head of training."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.vision_tower = VisionTower(c)
        self.multi_modal_projector = Projector(c)
        self.language_model = Decoder(c)
        self.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        self.dense_head = DenseHead(c)
        initialize(self)

    @property
    def all_layers(self) -> tuple[int, ...]:
        return tuple(range(self.config.layers))

    @property
    def half_layers(self) -> tuple[int, ...]:
        """Every second layer. The others begin as the identity, so that adding them later changes nothing at once."""
        return tuple(range(0, self.config.layers, 2))

    def read(
        self, features: Tensor, head: Tensor, text: Packing, active: tuple[int, ...], shown: Tensor | None = None
    ) -> Tensor:
        """States ``[B, T, W]`` of the packed questions about the pictures of ``features`` ``[B, 576, vision_width]``.

        ``head`` ``[1, H]`` holds the ids in front of the picture; ``active`` the decoder layers that take part;
        ``shown`` int64 ``[B, S]`` the patches that the decoder sees, ascending, at their own positions (None: all).
        """
        batch = features.shape[0]
        embed = self.language_model.embed_tokens
        places = torch.arange(features.shape[1], device=features.device).expand(batch, -1) if shown is None else shown
        if shown is not None:
            features = features.gather(1, shown[..., None].expand(-1, -1, features.shape[2]))
        picture = self.multi_modal_projector(features)
        start = embed(head).to(picture.dtype).expand(batch, -1, -1)
        x = torch.cat([start, picture, embed(text.ids).to(picture.dtype)], 1)
        length = start.shape[1]
        before = torch.arange(length, device=x.device).expand(batch, -1)
        positions = torch.cat([before, places + length, text.positions + length + self.config.image_tokens], 1)
        mask = question_mask(text.segments, length + picture.shape[1], x.dtype)
        out: Tensor = self.language_model(x, positions, mask, active)
        return out


@dataclass(frozen=True)
class Packing:
    """The packed questions of a batch: int64 ``[B, T]`` each, see ``data.Packed``."""

    ids: Tensor
    segments: Tensor
    positions: Tensor


def question_mask(segments: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """``[B, 1, T, prefix + T]``: 0 where a row may look (the picture, its own question so far), else very negative."""
    batch, length = segments.shape
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    own = (segments[:, :, None] == segments[:, None, :]) & causal
    allowed = torch.cat([own.new_ones(batch, length, prefix), own], 2)[:, None]
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, FORBIDDEN)


def initialize(model: DemoModel) -> None:
    """Scaled normal weights; outputs of residual branches start small, and every second decoder layer at zero."""
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            continue
        std = 0.6 / math.sqrt(parameter.shape[1])
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
            std *= 0.3
        nn.init.normal_(parameter, std=std)
    nn.init.normal_(model.vision_tower.class_embedding, std=0.02)
    nn.init.normal_(model.vision_tower.position_embedding.weight, std=0.02)
    nn.init.normal_(model.language_model.embed_tokens.weight, std=EMBEDDING_STD)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    for layer in list(model.language_model.layers)[1::2]:
        assert isinstance(layer, DecoderLayer)
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
