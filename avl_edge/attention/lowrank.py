"""Low-rank rows: heads merged, keys before RoPE, values absorbed (AttentionPack, arXiv 2603.23914).

The keys of a layer's image rows, before RoPE and with their heads merged, are a matrix ``[T, H_kv * d]``; so are the
values. Each is kept as coefficients ``[T, R]`` over a basis ``[R, H_kv * d]`` from a randomized SVD. A row's
coefficients are a record of the pool and the basis is R rows of it, so that the pool knows every byte. To attend, keys
are rebuilt and rotated to their original positions, values never are: the weighted sum is taken of the coefficients and
multiplied with the basis once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import KvShape
from ..kv.formats import decode_coefficients, encode_coefficients
from ..kv.layout import Format
from ..kv.store import RowStore
from ..model.network.rope import rotate, unrotate

_OVERSAMPLING, _ITERATIONS = 8, 2


def fit(rows: Tensor, rank: int) -> Tensor:
    """A basis float32 ``[rank, width]`` of ``rows`` ``[T, width]``, the strongest direction first.

    Its rows are orthogonal, each as long as the largest coefficient that it gets here, so that coefficients are of one
    size and int8 serves them all. Directions that the rows do not have are zero. The same rows give the same basis, on
    every device but for rounding.
    """
    rows = rows.float()
    count = min(rank, *rows.shape)
    basis = rows.new_zeros(rank, rows.shape[1])
    basis[:count] = _directions(rows, min(count + _OVERSAMPLING, *rows.shape))[:count]
    return basis * (rows @ basis.T).abs().amax(0)[:, None]


def _directions(rows: Tensor, count: int) -> Tensor:
    """About the ``count`` strongest directions ``[count, width]`` of ``rows``, of which the last few are less sure.

    A randomized SVD (Halko et al., arXiv 0909.4061, algorithm 5.1) from numbers of the CPU's, so that every device
    begins alike and nobody's random state changes.
    """
    tall = rows if len(rows) >= rows.shape[1] else rows.T
    random = torch.randn(tall.shape[1], count, generator=torch.Generator().manual_seed(0))
    found = torch.linalg.qr(tall @ random.to(rows.device)).Q
    for _ in range(_ITERATIONS):
        found = torch.linalg.qr(tall.T @ found).Q
        found = torch.linalg.qr(tall @ found).Q
    left, _, right = torch.linalg.svd(found.T @ tall, full_matrices=False)
    directions: Tensor = right if tall is rows else (found @ left).T
    return directions


def coefficients(rows: Tensor, basis: Tensor) -> Tensor:
    """float32 ``[n, rank]`` of ``rows`` ``[n, width]``, the nearest that a basis with orthogonal rows can come."""
    basis = basis.float()
    return rows.float() @ (basis / basis.square().sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).T


@dataclass(frozen=True)
class Rows:
    """``n`` rows to attend: ``keys`` ``[n, H_kv, d]`` after RoPE, and ``values`` ``[n, H_kv, d]`` or, with a ``basis``
    ``[r, H_kv, d]``, as coefficients ``[n, r]``."""

    keys: Tensor
    values: Tensor
    basis: Tensor | None = None

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum of the values by ``weights`` ``[H_kv, group, n]``: ``[H_kv, group, d]``."""
        if self.basis is None:
            return torch.einsum("kgn,nkd->kgd", weights, self.values.float())
        mixed = torch.einsum("kgn,nr->kgr", weights, self.values.float())
        return torch.einsum("kgr,rkd->kgd", mixed, self.basis.float())


def attend(query: Tensor, parts: Sequence[Rows], scale: float) -> tuple[Tensor, list[Tensor]]:
    """One query ``[H, d]`` over the rows of all parts.

    Returns ``[H, d]`` in the query's dtype, and the head mean of each part's softmax weights, float32 ``[n]``.
    """
    keys = torch.cat([part.keys.float() for part in parts])
    wide = query.float().view(keys.shape[1], -1, query.shape[1]) * scale
    softmax = torch.einsum("kgd,rkd->kgr", wide, keys).softmax(-1)
    weights = torch.split(softmax, [len(part.keys) for part in parts], dim=-1)
    out = sum((part.weighted(weight) for part, weight in zip(parts, weights, strict=True)), torch.zeros_like(wide))
    return out.view(query.shape).to(query.dtype), [weight.mean((0, 1)) for weight in weights]


class LowRankRows:
    """Low-rank rows in a pool: ``store`` has their records and bases, ``angles`` gives RoPE's cosines and sines."""

    def __init__(self, store: RowStore, angles: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self._store = store
        self._angles = angles

    def begin(self, basis: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Fit a layer's basis to rows ``[T, H_kv, d]``, keys after RoPE, and keep it in the exact rows ``basis``."""
        pair = (self._before_rope(keys, positions), values)
        bases = [fit(rows.flatten(1), len(basis)).view(-1, *keys.shape[1:]).to(keys) for rows in pair]
        self._store.write(basis, bases[0], bases[1])

    def write(
        self, format_: Format, ids: Tensor, basis: Tensor, keys: Tensor, values: Tensor, positions: Tensor
    ) -> None:
        """Keep rows, keys after RoPE and values, each ``[n, H_kv, d]``, as coefficients."""
        pairs = zip((self._before_rope(keys, positions), values), self._store.read(basis), strict=True)
        found = [coefficients(rows.flatten(1), base.flatten(1)) for rows, base in pairs]
        records = [encode_coefficients(format_, each, keys.dtype) for each in found]
        self._store.write_records(ids, format_, records[0], records[1])

    def read(self, format_: Format, ids: Tensor, basis: Tensor, positions: Tensor) -> Rows:
        """Rows to attend: by as many directions as the format reads. Keys are rebuilt, values are not."""
        count = format_.read_rank
        key_basis, value_basis = self._store.read(basis[:count])
        _, heads, dim = key_basis.shape
        shape = KvShape(1, heads, dim, key_basis.element_size())
        records = self._store.read_records(ids, format_, format_.read_bytes(shape) // 2)
        keys, values = (decode_coefficients(format_, each, key_basis.dtype)[:, :count] for each in records)
        rebuilt = torch.einsum("nr,rkd->nkd", keys, key_basis.float())
        return Rows(rotate(rebuilt, *self._angles(positions)), values, value_basis)

    def dense(self, format_: Format, ids: Tensor, basis: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values, each ``[n, H_kv, d]`` in the model's dtype."""
        rows = self.read(format_, ids, basis, positions)
        assert rows.basis is not None
        values = torch.einsum("nr,rkd->nkd", rows.values, rows.basis.float())
        return rows.keys.to(self._store.keys.dtype), values.to(self._store.keys.dtype)

    def _before_rope(self, keys: Tensor, positions: Tensor) -> Tensor:
        return unrotate(keys, *self._angles(positions))
