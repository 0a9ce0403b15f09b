"""The kernels of ``plugins/cuda/token_attention.cu`` as methods: many new tokens at once, a prompt's.

As in :mod:`avl_edge.attention.cuda.launch`: raw device pointers, 16-byte aligned, sizes and a raw stream in, nothing
out; launches allocate nothing and read no count from the host but their arguments. t new tokens, B sequences, N row
ids, R rows of the pool, P row formats, W score queries, H query and H_kv key/value heads, d head size; "row" is the
kernels' dtype. What reads rows is compiled twice: for exact ones alone, and for those of all formats.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...attention.cuda import Gpu, Module, compiled, source
from ...attention.cuda.driver import Argument
from ...config import require

NAME = "token_attention.cu"
ROWS = {"float16": "Half", "bfloat16": "Bfloat", "float32": "Float"}
"""By the name that torch and safetensors use."""
PACKED = "-DPACKED"
"""The compiler's option for rows of all formats."""


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
    arch: str,
    shape: TokenShape,
    *,
    packed: bool = False,
    newest: tuple[int, int] | None = None,
    folder: Path | None = None,
) -> bytes:
    """The kernels as a module for ``arch``, like "sm_87"; as :func:`avl_edge.attention.cuda.cubin`, errors included.
    ``packed``: those for rows of all formats."""
    return compiled(NAME, arch, (*shape.options, *[PACKED] * packed), newest, folder)


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
    """The kernels of one shape, launched through ``module`` and, where rows are packed, through another one."""

    def __init__(self, module: Module, shape: TokenShape, packed: Callable[[], Module] | None = None) -> None:
        """``packed`` gives the module for rows of all formats, asked for once; without it rows are exact."""
        self.shape = shape
        self._modules, self._packed = {False: module}, packed  # by whether rows may be packed

    @classmethod
    def load(cls, gpu: Gpu, shape: TokenShape) -> TokenKernels:
        """On a GPU; raises :class:`~avl_edge.attention.cuda.NoCuda` and
        :class:`~avl_edge.attention.cuda.CompileFailed`."""

        def load(packed: bool) -> Module:
            return gpu.load(token_cubin(gpu.arch, shape, packed=packed, newest=gpu.cuda))

        return cls(load(False), shape, lambda: load(True))

    def prepare(self, parts: int) -> None:
        """Have the kernels ready that read rows of so many formats; as :meth:`load`."""
        if parts > 1 and True not in self._modules:
            assert self._packed is not None, "kernels for exact rows only"
            self._modules[True] = self._packed()

    def attend(self, of: Tokens, attended: int, log_sums: int, stream: int) -> None:
        """avl_token_attend: row ``attended`` ``[t, H, d]``, zeros for a token that sees nothing, and float32
        ``log_sums`` ``[t, H]``."""
        grid = (-(-of.tokens // self.shape.teams), of.kv_heads * self.shape.group, 1)
        pointers = _p(of.query, of.key, of.value, of.pool_keys, of.pool_values, of.rows, of.row_offsets, of.slots)
        sizes = _i(of.tokens, of.sequences, of.parts, of.kv_heads)
        arguments = (pointers, _p(of.token_offsets), sizes, _p(attended, log_sums))
        self._launch("avl_token_attend", grid, stream, *arguments, parts=of.parts)

    def scores(self, of: Tokens, log_sums: int, row_scores: int, token_scores: int, stream: int) -> None:
        """avl_token_scores: float32 ``row_scores`` ``[2, N]`` and ``token_scores`` ``[2, t]``, after :meth:`attend`."""
        grid = (-(-(of.room + of.tokens) // self.shape.teams), 1, 1)
        pointers = _p(of.query, of.key, of.pool_keys, of.rows, of.row_offsets, of.slots, of.token_offsets)
        sizes = _i(of.tokens, of.sequences, of.parts, of.kv_heads, of.room, of.queries)
        arguments = (pointers, _p(of.score_queries, log_sums), sizes, _p(row_scores, token_scores))
        self._launch("avl_token_scores", grid, stream, *arguments, parts=of.parts)

    def join(self, of: Tokens, attended: int, log_sums: int, token_scores: int, stream: int) -> None:
        """avl_token_join, after avl_merge: changes ``attended`` and ``log_sums`` of tokens without a slot, and writes
        float32 ``token_scores`` ``[2, t]`` unless it is 0."""
        pointers = _p(of.query, of.key, of.value, of.slots, of.score_queries)
        sizes = _i(of.tokens, of.parts, of.kv_heads, of.queries)
        results = _p(attended, log_sums, token_scores)
        self._launch("avl_token_join", (of.tokens, 1, 1), stream, pointers, sizes, results)

    def sums(self, of: Tokens, row_scores: int, stream: int) -> None:
        """avl_token_sums, after avl_scores: the second line of float32 ``row_scores`` ``[2, N]``, from the first."""
        grid = (-(-of.room // (32 * self.shape.warps)), 1, 1)
        sizes = _i(of.sequences, of.parts, of.room, of.queries)
        self._launch("avl_token_sums", grid, stream, _p(of.row_offsets, of.score_queries), sizes, _p(row_scores))

    def _launch(
        self, kernel: str, grid: tuple[int, int, int], stream: int, *arguments: tuple[Argument, ...], parts: int = 1
    ) -> None:
        flat = [argument for part in arguments for argument in part]
        self.prepare(parts)
        self._modules[parts > 1].launch(kernel, grid, 32 * self.shape.warps, stream, flat)


def _p(*addresses: int) -> tuple[Argument, ...]:
    return tuple(ctypes.c_void_p(address or None) for address in addresses)


def _i(*numbers: int) -> tuple[Argument, ...]:
    return tuple(ctypes.c_int32(number) for number in numbers)
