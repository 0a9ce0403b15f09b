"""Vision transformers over as many patches as a picture has, with rotary positions of two axes: the Qwens'.

Patches stand in blocks of ``merge`` x ``merge``, row by row within a block and the blocks row by row, since each block
becomes one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import Weights
from .layers import activation
from .rope import rotate

Norm = Callable[[Tensor], Tensor]


def in_blocks(rows: int, columns: int, merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, int64 ``[n]``, of a picture of ``rows`` x ``columns`` blocks."""
    grid = torch.arange(merge * rows)[:, None].expand(-1, merge * columns)
    across = torch.arange(merge * columns)[None].expand(merge * rows, -1)
    row, column = (each.reshape(rows, merge, columns, merge).transpose(1, 2).flatten() for each in (grid, across))
    return row, column


def axial_angles(row: Tensor, column: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 ``[n, 1, head_dim]``: half of the pairs turn by the row, half by the column."""
    size = head_dim // 2
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=row.device) / size)
    both = torch.cat([position.float()[:, None] * frequencies for position in (row, column)], dim=-1)
    angles = torch.cat([both, both], dim=-1)[:, None]
    return angles.cos(), angles.sin()


class Mlp:
    """Two matrices, ``first`` and ``second``, with biases."""

    def __init__(self, weights: Weights, first: str, second: str, sizes: tuple[int, int, int], kind: str) -> None:
        """``sizes``: of the input, between the matrices, and of the output."""
        inputs, inner, outputs = sizes
        self._first = weights.linear(first, inner, inputs, bias=True)
        self._second = weights.linear(second, outputs, inner, bias=True)
        self._activation = activation(kind)

    def __call__(self, x: Tensor) -> Tensor:
        return self._second(self._activation(self._first(x)))


class GatedMlp:
    """Three matrices with biases."""

    def __init__(self, weights: Weights, name: str, size: int, inner: int, kind: str) -> None:
        self._gate, self._up = (
            weights.linear(f"{name}.{each}_proj", inner, size, bias=True) for each in ("gate", "up")
        )
        self._down = weights.linear(f"{name}.down_proj", size, inner, bias=True)
        self._activation = activation(kind)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._activation(self._gate(x)) * self._up(x))


class Block:
    """A pre-norm layer: attention by one matrix for query, key and value, and an MLP."""

    def __init__(
        self,
        weights: Weights,
        name: str,
        size: int,
        heads: int,
        norms: tuple[Norm, Norm],
        mlp: Callable[[Tensor], Tensor],
    ) -> None:
        self._heads = heads
        self._norm1, self._norm2 = norms
        self._together = weights.linear(f"{name}.attn.qkv", 3 * size, size, bias=True)
        self._out = weights.linear(f"{name}.attn.proj", size, size, bias=True)
        self._mlp = mlp

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], lengths: Sequence[int] | None = None) -> Tensor:
        """``x`` ``[n, size]``; ``lengths`` of the windows in which patches see each other (None: all do)."""
        x = x + self._attention(self._norm1(x), angles, lengths)
        return x + self._mlp(self._norm2(x))

    def _attention(self, x: Tensor, angles: tuple[Tensor, Tensor], lengths: Sequence[int] | None) -> Tensor:
        query, key, value = self._together(x).view(len(x), 3, self._heads, -1).unbind(1)
        query, key = (rotate(each.float(), *angles).to(x.dtype) for each in (query, key))
        sizes = [len(x)] if lengths is None else list(lengths)
        windows = zip(*(torch.split(part, sizes) for part in (query, key, value)), strict=True)
        attended = [
            F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in window))[0].transpose(0, 1)
            for window in windows
        ]
        return self._out(torch.cat(attended).flatten(1))
