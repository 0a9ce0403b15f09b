"""The kernels as methods: raw device pointers, sizes and a raw stream handle in, nothing out.

    kernels = Kernels.load(KernelShape.of(128, heads=32, kv_heads=32, dtype="float16"))  # compiles, or takes the cache
    splits = kernels.splits(kv_heads=32, rows=4096)  # once, for all batches
    workspace = Workspace.of(kernels.shape, batch, heads, splits, capacity, scores=True)
    kernels.step(Step(...), pool, workspace, address, stream)  # one layer of a decode step; address: workspace.bytes

B sequences, H query and H_kv key/value heads, d head size, S splits, R rows of the pool, ``capacity`` entries in the
list of rows. Pointers are ``int`` addresses of device memory, 16-byte aligned, 0 for null; "row" is the kernels' type,
float16 or bfloat16; ``stream`` is a ``cudaStream_t`` as an int, 0 the default stream. What a pointer names is
contiguous unless a stride is given. Launches return at once, allocate nothing and read no count from the host's memory
but those in their argument lists: they can be captured in a CUDA graph. Nothing is checked that only the device knows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

from .compile import KernelShape, cubin
from .driver import Argument, Gpu, Module

_ALIGN = 256
_BLOCKS_ON_A_MULTIPROCESSOR = 3  # of avl_attend with 4 warps: 48 KB of shared memory each, of Orin's 164
_WAVES = 3  # times the blocks that the GPU holds at once, so that its multiprocessors end together
_MULTIPROCESSORS_OF_ORIN = 16


@dataclass(frozen=True)
class Pool:
    """Where rows lie: ``keys`` and ``values``, row ``[R, H_kv, d]`` each; strides in elements, multiples of 8."""

    keys: int
    values: int
    kv_heads: int
    key_row_stride: int
    key_head_stride: int
    value_row_stride: int
    value_head_stride: int

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return self.key_row_stride, self.key_head_stride, self.value_row_stride, self.value_head_stride


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of one layer's attention, the next layer's too: byte offsets into one buffer of ``bytes``."""

    batch: int
    heads: int
    splits: int
    capacity: int
    sums: int
    states: int
    log_sums: int
    logits: int
    bytes: int

    @classmethod
    def of(cls, shape: KernelShape, batch: int, heads: int, splits: int, capacity: int, *, scores: bool) -> Workspace:
        """Float32 sums ``[B, S, H, d]``, states ``[B, S, H, 2]``, log_sums ``[B, H]``; with ``scores`` also logits
        ``[H, capacity]``."""
        parts = batch * splits * heads
        sizes = (4 * parts * shape.head_dim, 8 * parts, 4 * batch * heads, 4 * heads * capacity if scores else 0)
        places = [0]
        for size in sizes:
            places.append(-(-(places[-1] + size) // _ALIGN) * _ALIGN)
        return cls(batch, heads, splits, capacity, *places)


@dataclass(frozen=True)
class Step:
    """Pointers of one layer of a decode step.

    ``query`` row ``[B, H, d]``; ``new_keys``, ``new_values`` row ``[B, H_kv, d]``; ``slots`` int32 ``[B]``, the pool
    row of each new token, negative: none; ``rows`` int32 ``[capacity]`` and ``offsets`` int32 ``[B + 1]``: sequence b
    reads ``rows[offsets[b]]`` to ``rows[offsets[b + 1] - 1]``, its new token's own among them; ``out`` row
    ``[B, H, d]``, zeros for a sequence that reads nothing; ``scores`` float32 ``[capacity]``, or 0 where nobody asks.
    """

    query: int
    new_keys: int
    new_values: int
    slots: int
    rows: int
    offsets: int
    out: int
    scores: int = 0


@dataclass(frozen=True)
class PromptHeads:
    """A prompt's queries or keys: element (token, head, i) at ``address + token_stride * token + head_stride * head +
    i``, strides in elements, multiples of 8. So ``[n, H, d]`` and ``[H, n, d]`` both do."""

    address: int
    token_stride: int
    head_stride: int


class Kernels:
    """The kernels of one shape, launched through ``module``."""

    def __init__(self, module: Module, shape: KernelShape, multiprocessors: int = _MULTIPROCESSORS_OF_ORIN) -> None:
        """``multiprocessors`` of the GPU decide how finely selections are split."""
        self.shape = shape
        self._module = module
        self._multiprocessors = multiprocessors

    @classmethod
    def load(cls, shape: KernelShape, device: int = 0) -> Kernels:
        """On GPU number ``device``: compiled for it, or taken from the cache, and loaded into its primary context.

        Raises :class:`~avl_edge.cuda.errors.NoCuda`, :class:`~avl_edge.cuda.errors.CompileFailed`.
        """
        gpu = Gpu(device)
        return cls(gpu.load(cubin(gpu.arch, shape, newest=gpu.cuda)), shape, gpu.multiprocessors)

    def splits(self, kv_heads: int, rows: int) -> int:
        """S, the splits of a selection of up to ``rows`` rows, for every batch.

        It fills the GPU with a single sequence, and leaves each warp of a split at least a tile of rows. It does not
        depend on the batch, so that a sequence's sums do not depend on its neighbours either.
        """
        blocks = self._multiprocessors * _BLOCKS_ON_A_MULTIPROCESSOR * _WAVES
        most = -(-rows // (self.shape.warps * self.shape.tile))
        return max(1, min(-(-blocks // kv_heads), most))

    # One layer of a decode step

    def step(self, step: Step, pool: Pool, workspace: Workspace, address: int, stream: int) -> None:
        """Write the new rows into their slots, attend, and score where ``step.scores`` is given.

        ``address``: ``workspace.bytes`` of device memory. Three launches, four with scores.
        """
        batch, heads, splits, capacity = workspace.batch, workspace.heads, workspace.splits, workspace.capacity
        sums, states, log_sums, logits = (
            address + place for place in (workspace.sums, workspace.states, workspace.log_sums, workspace.logits)
        )
        self.append(step.new_keys, step.new_values, step.slots, batch, pool, stream)
        asked = logits if step.scores else 0
        self.attend(step.query, pool, step.rows, step.offsets, batch, splits, capacity, sums, states, asked, stream)
        self.merge(sums, states, step.offsets, batch, heads, splits, step.out, log_sums, stream)
        if step.scores:
            self.scores(logits, log_sums, step.offsets, batch, heads, capacity, step.scores, stream)

    def append(self, new_keys: int, new_values: int, slots: int, rows: int, pool: Pool, stream: int) -> None:
        """avl_append: write ``rows`` new rows, row ``[rows, H_kv, d]`` each, into pool rows ``slots`` (int32
        ``[rows]``, distinct; a negative one drops its row)."""
        if rows:
            grid = (rows, 2, 1)
            numbers = (pool.kv_heads, *pool.strides)
            self._launch("avl_append", grid, stream, _p(new_keys, new_values, slots), _i(*numbers), _pool(pool))

    def attend(
        self,
        query: int,
        pool: Pool,
        rows: int,
        offsets: int,
        batch: int,
        splits: int,
        capacity: int,
        sums: int,
        states: int,
        logits: int,
        stream: int,
    ) -> None:
        """avl_attend: partial results of each split; see :class:`Step` for ``query``, ``rows`` and ``offsets``.

        Writes float32 ``sums`` ``[B, S, H, d]``, ``states`` ``[B, S, H, 2]`` and, unless it is 0, ``logits``
        ``[H, capacity]``.
        """
        inputs = (*_p(query), *_pool(pool), *_p(rows, offsets))
        grid = (pool.kv_heads, splits, batch)
        self._launch("avl_attend", grid, stream, inputs, _i(*pool.strides, capacity), _p(sums, states, logits))

    def merge(
        self,
        sums: int,
        states: int,
        offsets: int,
        batch: int,
        heads: int,
        splits: int,
        out: int,
        log_sums: int,
        stream: int,
    ) -> None:
        """avl_merge: row ``out`` ``[B, H, d]`` and float32 ``log_sums`` ``[B, H]`` from what avl_attend left."""
        grid = (self._warps_to_blocks(heads), batch, 1)
        self._launch("avl_merge", grid, stream, _p(sums, states, offsets), _i(heads, splits), _p(out, log_sums))

    def scores(
        self, logits: int, log_sums: int, offsets: int, batch: int, heads: int, capacity: int, scores: int, stream: int
    ) -> None:
        """avl_scores: float32 ``scores`` ``[capacity]``, the weight of each listed row, the mean over heads."""
        grid = (min(-(-capacity // 32), 4 * self._multiprocessors), batch, 1)
        self._launch("avl_scores", grid, stream, _p(logits, log_sums, offsets), _i(heads, capacity), _p(scores))

    # The scores of a prompt

    def score_prompt(
        self,
        query: PromptHeads,
        keys: PromptHeads,
        kv_heads: int,
        positions: int,
        n: int,
        queries: int,
        last: int,
        total: int,
        workspace: int,
        piece: int,
        stream: int,
    ) -> None:
        """The attention that a prompt's ``n`` tokens received from some of them, averaged over heads.

        ``positions`` int32 ``[queries]``: tokens in [0, n), of which the last gives float32 ``last`` ``[n]`` and the
        others are added to ``total`` ``[n]``, which the caller has zeroed. ``workspace`` holds ``piece`` queries at a
        time: :meth:`prompt_workspace` bytes of device memory.
        """
        heads = kv_heads * self.shape.group
        log_sums = workspace + -(-4 * piece * heads * n // _ALIGN) * _ALIGN
        for first in range(0, queries, piece):
            count = min(piece, queries - first)
            summed = count - (first + count == queries)
            self.prompt_logits(query, keys, kv_heads, positions + 4 * first, n, count, workspace, stream)
            self.prompt_log_sums(workspace, n, count * heads, log_sums, stream)
            self.prompt_scores(workspace, log_sums, n, heads, count, summed, last, total, stream)

    @staticmethod
    def prompt_workspace(n: int, heads: int, piece: int) -> int:
        """Bytes that :meth:`score_prompt` needs for ``piece`` queries at a time."""
        return -(-4 * piece * heads * n // _ALIGN) * _ALIGN + 4 * piece * heads

    def prompt_logits(
        self,
        query: PromptHeads,
        keys: PromptHeads,
        kv_heads: int,
        positions: int,
        n: int,
        queries: int,
        logits: int,
        stream: int,
    ) -> None:
        """avl_prompt_logits: float32 ``logits`` ``[queries, H, n]`` for the tokens at ``positions``, int32."""
        tiles = -(-n // (self.shape.tile * self.shape.warps))
        grid = (kv_heads, min(tiles, -(-8 * self._multiprocessors // kv_heads)), 1)
        sizes = _i(n, queries, query.token_stride, query.head_stride, keys.token_stride, keys.head_stride)
        self._launch("avl_prompt_logits", grid, stream, _p(query.address, keys.address, positions), sizes, _p(logits))

    def prompt_log_sums(self, logits: int, n: int, softmaxes: int, log_sums: int, stream: int) -> None:
        """avl_prompt_log_sums: float32 ``log_sums`` ``[softmaxes]``, queries * H of them, over ``n`` logits each."""
        grid = (self._warps_to_blocks(softmaxes), 1, 1)
        self._launch("avl_prompt_log_sums", grid, stream, _p(logits), _i(n, softmaxes), _p(log_sums))

    def prompt_scores(
        self, logits: int, log_sums: int, n: int, heads: int, queries: int, summed: int, last: int, total: int,
        stream: int,
    ) -> None:  # fmt: skip
        """avl_prompt_scores: writes float32 ``last`` ``[n]`` from the last query, adds the first ``summed`` to
        ``total`` ``[n]``."""
        grid = (-(-n // 32), 1, 1)
        sizes = _i(n, heads, queries, summed)
        self._launch("avl_prompt_scores", grid, stream, _p(logits, log_sums), sizes, _p(last, total))

    def _warps_to_blocks(self, warps: int) -> int:
        return -(-warps // self.shape.warps)

    def _launch(self, kernel: str, grid: tuple[int, int, int], stream: int, *arguments: Iterable[Argument]) -> None:
        flat = [argument for part in arguments for argument in part]
        self._module.launch(kernel, grid, 32 * self.shape.warps, stream, flat)


def _p(*addresses: int) -> tuple[Argument, ...]:
    return tuple(ctypes.c_void_p(address or None) for address in addresses)


def _i(*numbers: int) -> tuple[Argument, ...]:
    return tuple(ctypes.c_int32(number) for number in numbers)


def _pool(pool: Pool) -> tuple[Argument, ...]:
    return _p(pool.keys, pool.values)
