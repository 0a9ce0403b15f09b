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

from tools.demo_model.config import ModelConfig
from tools.demo_model.fast import attention, join_heads, rms_norm, split_heads
from tools.demo_model.vision import Projector, VisionTower
from tools.demo_model.vocabulary import NUM_CHARACTERS, NUM_FIELDS, NUM_INDICES, NUM_OBJECTS

# Added to the score of a row that must not be seen.
FORBIDDEN = -1e4
EMBEDDING_STD = 0.5


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
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        p = x.shape[1] - mask.shape[2]
        picture, text = torch.split(q, [p, mask.shape[2]], 2)
        out = attention(text, k, v, mask)
        if not last:
            out = torch.cat([attention(picture, k[:, :, :p], v[:, :, :p], causal_mask(p, x)), out], 2)
        projected: Tensor = self.o_proj(join_heads(out))
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
