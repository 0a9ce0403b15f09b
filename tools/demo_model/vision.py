"""Vision tower and projector as they are trained: LLaVA's mathematics with the names of transformers' parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo_model.canvas import GRID, PATCH
from tools.demo_model.config import ModelConfig
from tools.demo_model.fast import attention, join_heads, split_heads


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(join_heads(attention(q, k, v)))
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
