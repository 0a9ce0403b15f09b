"""The kernels of ``plugins/cuda/token_attention.cu`` as methods: many new tokens at once, a prompt's.

As in :mod:`avl_edge.cuda.launch`: raw device pointers, 16-byte aligned, sizes and a raw stream in, nothing out;
launches allocate nothing and read no count from the host but their arguments. t new tokens, B sequences, N row ids, R
rows of the pool, P row formats, W score queries, H query and H_kv key/value heads, d head size; "row" is the kernels'
dtype. With more formats than one, only :meth:`TokenKernels.join` is for the call.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..config import require
from ..cuda import Gpu, Module, compiled, source
from ..cuda.driver import Argument

NAME = "token_attention.cu"
ROWS = {"float16": "Half", "bfloat16": "Bfloat", "float32": "Float"}
"""By the name that torch and safetensors use."""


@dataclass(frozen=True)
class TokenShape:
    """What the kernels are compiled for: ``head_dim``, a multiple of 8 up to 256; ``group``, the query heads that share
    a key/value head; ``row``, one of :data:`ROWS`' values; ``warps`` of a block. :class:`BadInput` for any other."""

    head_dim: int
    group: int
    row: str
    warps: int = 4

    def __post_init__(self) -> None:
        dim = self.head_dim
        require(8 <= dim <= 256 and dim % 8 == 0, f"the GPU kernels take head sizes of 8, 16, ... 256, not {dim}")
        require(self.group >= 1, f"the GPU kernels take at least one query head per key/value head, not {self.group}")
        require(self.row in ROWS.values(), f"the GPU kernels take {', '.join(ROWS.values())} rows, not {self.row!r}")

    @property
    def teams(self) -> int:
        """Tokens or columns that a block takes, as the source derives it."""
        lanes = 2 if self.head_dim <= 64 else 4 if self.head_dim <= 128 else 8
        return 32 * self.warps // lanes

    @property
    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        return f"-DHEAD_DIM={self.head_dim}", f"-DGROUP={self.group}", f"-DROW={self.row}", f"-DWARPS={self.warps}"


def digest() -> str:
    """SHA-256, in hexadecimal digits, of all kernels that the plugin launches, without comments and spacing."""
    return hashlib.sha256(f"{source.digest()} {source.digest(NAME)}".encode()).hexdigest()


def token_cubin(
    arch: str, shape: TokenShape, *, newest: tuple[int, int] | None = None, folder: Path | None = None
) -> bytes:
    """The kernels as a module for ``arch``, like "sm_87"; as :func:`avl_edge.cuda.cubin`, errors included."""
    return compiled(NAME, arch, shape.options, newest, folder)


@dataclass(frozen=True)
class Tokens:
    """Pointers and sizes of one layer's call.

    ``query`` row ``[t, H, d]``; ``key``, ``value`` row ``[t, H_kv, d]``; ``pool_keys``, ``pool_values`` row
    ``[R, H_kv, d]``; ``rows`` int32 ``[N]``; ``row_offsets`` int32 ``[P * B + 1]``; ``slots`` int32 ``[P, t]``;
    ``token_offsets`` int32 ``[B + 1]``; ``score_queries`` int32 ``[W]``; the counts t, B, P, H_kv, N and W.
    """

    query: int
    key: int
    value: int
    pool_keys: int
    pool_values: int
    rows: int
    row_offsets: int
    slots: int
    token_offsets: int
    score_queries: int
    tokens: int
    sequences: int
    parts: int
    kv_heads: int
    room: int
    queries: int


class TokenKernels:
    """The kernels of one shape, launched through ``module``."""

    def __init__(self, module: Module, shape: TokenShape) -> None:
        self.shape = shape
        self._module = module

    @classmethod
    def load(cls, gpu: Gpu, shape: TokenShape) -> TokenKernels:
        """On a GPU; raises :class:`~avl_edge.cuda.NoCuda` and :class:`~avl_edge.cuda.CompileFailed`."""
        return cls(gpu.load(token_cubin(gpu.arch, shape, newest=gpu.cuda)), shape)

    def attend(self, of: Tokens, attended: int, log_sums: int, stream: int) -> None:
        """avl_token_attend: row ``attended`` ``[t, H, d]``, zeros for a token that sees nothing, and float32
        ``log_sums`` ``[t, H]``."""
        grid = (-(-of.tokens // self.shape.teams), of.kv_heads * self.shape.group, 1)
        pointers = _p(of.query, of.key, of.value, of.pool_keys, of.pool_values, of.rows, of.row_offsets, of.slots)
        sizes = _i(of.tokens, of.sequences, of.kv_heads)
        self._launch("avl_token_attend", grid, stream, pointers, _p(of.token_offsets), sizes, _p(attended, log_sums))

    def scores(self, of: Tokens, log_sums: int, row_scores: int, token_scores: int, stream: int) -> None:
        """avl_token_scores: float32 ``row_scores`` ``[N]`` and ``token_scores`` ``[2, t]``, after :meth:`attend`."""
        grid = (-(-(of.room + of.tokens) // self.shape.teams), 1, 1)
        pointers = _p(of.query, of.key, of.pool_keys, of.rows, of.row_offsets, of.slots, of.token_offsets)
        sizes = _i(of.tokens, of.sequences, of.kv_heads, of.room, of.queries)
        results = _p(row_scores, token_scores)
        self._launch(
            "avl_token_scores", grid, stream, pointers, _p(of.score_queries, log_sums), sizes, results
        )  # fmt: skip

    def join(self, of: Tokens, attended: int, log_sums: int, token_scores: int, stream: int) -> None:
        """avl_token_join, after avl_merge: changes ``attended`` and ``log_sums`` of tokens without a slot, and writes
        float32 ``token_scores`` ``[2, t]`` unless it is 0."""
        pointers = _p(of.query, of.key, of.value, of.slots, of.score_queries)
        sizes = _i(of.tokens, of.parts, of.kv_heads, of.queries)
        results = _p(attended, log_sums, token_scores)
        self._launch("avl_token_join", (of.tokens, 1, 1), stream, pointers, sizes, results)

    def _launch(self, kernel: str, grid: tuple[int, int, int], stream: int, *arguments: tuple[Argument, ...]) -> None:
        flat = [argument for part in arguments for argument in part]
        self._module.launch(kernel, grid, 32 * self.shape.warps, stream, flat)


def _p(*addresses: int) -> tuple[Argument, ...]:
    return tuple(ctypes.c_void_p(address or None) for address in addresses)


def _i(*numbers: int) -> tuple[Argument, ...]:
    return tuple(ctypes.c_int32(number) for number in numbers)
