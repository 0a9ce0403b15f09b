"""The kernels as methods: raw device pointers, sizes and a raw stream handle in, nothing out.

    kernels = Kernels.load(KernelShape.of(128, heads=32, kv_heads=32, dtype="float16"))  # compiles, or takes the cache
    splits = kernels.splits(kv_heads=32, rows=4096)  # once, for all batches
    workspace = Workspace.of(kernels.shape, batch, heads, splits, capacity, scores=True)
    kernels.step(Step(...), pool, workspace, address, stream)  # one layer of a decode step; address: workspace.bytes

Pointers and sizes are named as in :mod:`avl_edge.attention.cuda.pointers`; ``stream`` is a ``cudaStream_t`` as an int,
0 the default stream. Launches return at once, allocate nothing and read no count from the host's memory but those in
their argument lists: they can be captured in a CUDA graph. Nothing is checked that only the device knows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

from ...config import KvShape
from ...kv.layout import Format
from .compile import LOW_RANK, KernelShape, cubin, reader
from .driver import Argument, Gpu, Module
from .pointers import Bases, Lists, Pool, PromptHeads, Scan, Step, Workspace, aligned

_BLOCKS_ON_A_MULTIPROCESSOR = 3  # of avl_attend with 4 warps: 48 KB of shared memory each, of Orin's 164
_WAVES = 3  # times the blocks that the GPU holds at once, so that its multiprocessors end together
_MULTIPROCESSORS_OF_ORIN = 16


class Kernels:
    """The kernels of one shape, launched through ``module`` and, where rows are not exact, through one for each
    :func:`~avl_edge.attention.cuda.reader`."""

    def __init__(
        self,
        module: Module,
        shape: KernelShape,
        multiprocessors: int = _MULTIPROCESSORS_OF_ORIN,
        packed: Callable[[str], Module] | None = None,
    ) -> None:
        """``multiprocessors`` of the GPU decide how finely selections are split. ``packed`` gives the module of another
        reader, asked for once; without it rows are exact."""
        self.shape = shape
        self._modules = {"exact": module}
        self._multiprocessors = multiprocessors
        self._packed = packed

    @classmethod
    def load(cls, shape: KernelShape, device: int = 0) -> Kernels:
        """On GPU number ``device``: compiled for it, or taken from the cache, and loaded into its primary context.

        Raises :class:`~avl_edge.attention.cuda.errors.NoCuda`, :class:`~avl_edge.attention.cuda.errors.CompileFailed`.
        """
        gpu = Gpu(device)

        def load(name: str) -> Module:
            return gpu.load(cubin(gpu.arch, shape, name, newest=gpu.cuda))

        return cls(load("exact"), shape, gpu.multiprocessors, load)

    def prepare(self, formats: Iterable[str]) -> None:
        """Have the kernels of these formats ready, so that no launch has to wait for a compiler; as :meth:`load`."""
        for name in map(reader, formats):
            if name not in self._modules:
                assert self._packed is not None, "kernels for exact rows only"
                self._modules[name] = self._packed(name)

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
        """Smooth queries and new keys where ``step.smoothing`` is given, write the new rows into their slots, choose
        rows where ``step.scan`` says so, attend, and score where ``step.scores`` is given.

        ``address``: ``workspace.bytes`` of device memory. Exact rows take three launches, four with scores; another
        format one more, low-rank ones too, and one where new rows are written in it; a scan three, and one for each
        format; smoothing one.
        """
        if step.smoothing:
            self.smooth(step.query, step.new_keys, step.smoothing, step.lists.batch, pool, stream)
        self.append_parts(step, pool, stream)
        if step.scan is not None:
            self._choose(step, step.scan, pool, workspace, address, stream)
        self.attend_parts(step, pool, workspace, address, stream)
        if step.scores:
            self.score_parts(step, workspace, address, stream)

    def append_parts(self, step: Step, pool: Pool, stream: int) -> None:
        """The new rows of a step, a launch for each format that is written."""
        lists = step.lists
        for part, format_ in enumerate(lists.formats):
            if format_ in step.written:
                slots = lists.of_part(step.slots, part)
                self.append(step.new_keys, step.new_values, slots, lists.batch, pool, stream, format_)

    def attend_parts(self, step: Step, pool: Pool, workspace: Workspace, address: int, stream: int) -> None:
        """``step.out`` and the workspace's log_sums, over the rows of all parts; its logits where scores are wanted,
        and of low-rank rows."""
        lists, splits = step.lists, workspace.splits
        sums, states, log_sums = (address + offset for offset in (workspace.sums, workspace.states, workspace.log_sums))
        logits = address + workspace.logits
        for part, format_ in enumerate(lists.formats):
            if reader(format_) == LOW_RANK:
                assert step.bases is not None, "low-rank rows come with their bases"
                results = (sums, states, logits)
                self.attend_low_rank(
                    step.query, pool, lists, part, step.bases, step.smoothing, splits, *results, stream
                )
            else:
                wanted = logits if step.scores else 0
                self.attend(step.query, pool, lists, part, splits, sums, states, wanted, stream)
        self.merge(sums, states, lists, workspace.heads, splits, step.out, log_sums, stream)

    def score_parts(self, step: Step, workspace: Workspace, address: int, stream: int) -> None:
        """``step.scores``, after :meth:`attend_parts`."""
        logits, log_sums = address + workspace.logits, address + workspace.log_sums
        self.scores(logits, log_sums, step.lists, workspace.heads, step.scores, stream)

    def _choose(self, step: Step, scan: Scan, pool: Pool, workspace: Workspace, address: int, stream: int) -> None:
        heads, candidates = workspace.heads, scan.lists
        logits, log_sums, weights = (
            address + offset for offset in (workspace.logits, workspace.log_sums, workspace.weights)
        )
        for part, format_ in enumerate(candidates.formats):
            if format_ in scan.formats:
                self.scan(step.query, pool, candidates, part, logits, stream)
        self.log_sums(logits, candidates, heads, log_sums, stream)
        self.scores(logits, log_sums, candidates, heads, weights, stream)
        self.nucleus(weights, scan, step.lists, stream)

    def smooth(self, query: int, new_keys: int, smoothing: int, batch: int, pool: Pool, stream: int) -> None:
        """avl_smooth: row ``query`` ``[batch, H, d]`` and ``new_keys`` ``[batch, H_kv, d]`` smoothed in place, by
        ``smoothing`` as in :class:`Step`."""
        grid, numbers = (pool.kv_heads, batch, 1), _i(*pool.strides)
        self._launch("avl_smooth", grid, stream, _p(query, new_keys, smoothing), numbers, _p(pool.keys, pool.values))

    def append(
        self, new_keys: int, new_values: int, slots: int, rows: int, pool: Pool, stream: int, format_: str = "exact"
    ) -> None:
        """avl_append: write ``rows`` new rows, row ``[rows, H_kv, d]`` each, as rows ``slots`` of a format (int32
        ``[rows]``, distinct ids; a negative one drops its row)."""
        if rows:
            grid = (rows, 2, 1)
            numbers = _i(pool.kv_heads, *pool.strides)
            arenas = self._arenas(pool, format_)
            self._launch("avl_append", grid, stream, _p(new_keys, new_values, slots), numbers, arenas, format_=format_)

    def attend(
        self,
        query: int,
        pool: Pool,
        lists: Lists,
        part: int,
        splits: int,
        sums: int,
        states: int,
        logits: int,
        stream: int,
    ) -> None:
        """avl_attend: partial results of each split of one part, for row ``query`` ``[B, H, d]``.

        Writes its share of float32 ``sums`` ``[B, P * S, H, d]``, ``states`` ``[B, P * S, H, 2]`` and, unless it is 0,
        ``logits`` ``[H, capacity]``.
        """
        inputs = (*_p(query), *self._arenas(pool, lists.formats[part]), *_p(lists.rows, *lists.part(part)))
        numbers = _i(*pool.strides, lists.capacity, part * splits, len(lists.formats) * splits)
        grid = (pool.kv_heads, splits, lists.batch)
        results = _p(sums, states, logits)
        self._launch("avl_attend", grid, stream, inputs, numbers, results, format_=lists.formats[part])

    def attend_low_rank(
        self,
        query: int,
        pool: Pool,
        lists: Lists,
        part: int,
        bases: Bases,
        smoothing: int,
        splits: int,
        sums: int,
        states: int,
        logits: int,
        stream: int,
    ) -> None:
        """avl_attend_low_rank: as :meth:`attend` for a low-rank part, whose ``logits`` it needs in any case;
        ``smoothing`` as in :class:`Step`."""
        format_ = Format(lists.formats[part])
        inputs = (*_p(query, pool.keys, pool.values), *_p(lists.rows, *lists.part(part)))
        rebuilt_with = _p(bases.positions, bases.ids, bases.angles, smoothing)
        numbers = _i(*pool.strides, lists.capacity, part * splits, len(lists.formats) * splits)
        ranks = _i(bases.rank, format_.read_rank, format_.packs_coefficients)
        grid, results = (pool.kv_heads, splits, lists.batch), _p(sums, states, logits)
        self._launch(
            "avl_attend_low_rank", grid, stream, inputs, rebuilt_with, numbers, ranks, results, format_=format_.name
        )

    def merge(
        self, sums: int, states: int, lists: Lists, heads: int, splits: int, out: int, log_sums: int, stream: int
    ) -> None:
        """avl_merge: row ``out`` ``[B, H, d]`` and float32 ``log_sums`` ``[B, H]`` from what avl_attend left."""
        grid = (self._warps_to_blocks(heads), lists.batch, 1)
        inputs, numbers = _p(sums, states, lists.begins, lists.ends), _i(heads, splits, len(lists.formats))
        self._launch("avl_merge", grid, stream, inputs, numbers, _p(out, log_sums))

    def scores(self, logits: int, log_sums: int, lists: Lists, heads: int, scores: int, stream: int) -> None:
        """avl_scores: float32 ``scores`` ``[capacity]``, the weight of each listed row, the mean over heads."""
        grid = (min(-(-lists.capacity // 32), 4 * self._multiprocessors), lists.batch, len(lists.formats))
        inputs = _p(logits, log_sums, lists.begins, lists.ends)
        self._launch("avl_scores", grid, stream, inputs, _i(heads, lists.capacity), _p(scores))

    # The choice of rows within a step

    def scan(self, query: int, pool: Pool, lists: Lists, part: int, logits: int, stream: int) -> None:
        """avl_scan: float32 ``logits`` ``[H, capacity]`` of one part by a coarse scan of its keys."""
        tiles = -(-lists.capacity // (self.shape.tile * self.shape.warps))
        grid = (pool.kv_heads, min(tiles, -(-8 * self._multiprocessors // pool.kv_heads)), lists.batch)
        inputs = _p(query, pool.keys, lists.rows, *lists.part(part))
        numbers = _i(pool.key_row_stride, pool.key_head_stride, lists.capacity)
        self._launch("avl_scan", grid, stream, inputs, numbers, _p(logits), format_=lists.formats[part])

    def log_sums(self, logits: int, lists: Lists, heads: int, log_sums: int, stream: int) -> None:
        """avl_log_sums: float32 ``log_sums`` ``[B, H]`` of what avl_scan left."""
        grid = (self._warps_to_blocks(heads), lists.batch, len(lists.formats))
        inputs, numbers = _p(logits, lists.begins, lists.ends), _i(heads, lists.capacity)
        self._launch("avl_log_sums", grid, stream, inputs, numbers, _p(log_sums))

    def nucleus(self, weights: int, scan: Scan, attended: Lists, stream: int) -> None:
        """avl_nucleus: put the ids that ``scan`` chooses by float32 ``weights`` into the lists ``attended``."""
        candidates = scan.lists
        grid = (candidates.batch, len(candidates.formats), 1)
        inputs = _p(weights, candidates.rows, candidates.begins, candidates.ends, scan.limits, scan.listed)
        self._launch("avl_nucleus", grid, stream, inputs, _p(attended.rows, attended.ends, scan.picked))

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
        log_sums = workspace + aligned(4 * piece * heads * n)
        for first in range(0, queries, piece):
            count = min(piece, queries - first)
            summed = count - (first + count == queries)
            self.prompt_logits(query, keys, kv_heads, positions + 4 * first, n, count, workspace, stream)
            self.prompt_log_sums(workspace, n, count * heads, log_sums, stream)
            self.prompt_scores(workspace, log_sums, n, heads, count, summed, last, total, stream)

    @staticmethod
    def prompt_workspace(n: int, heads: int, piece: int) -> int:
        """Bytes that :meth:`score_prompt` needs for ``piece`` queries at a time."""
        return aligned(4 * piece * heads * n) + 4 * piece * heads

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

    def _arenas(self, pool: Pool, format_: str) -> tuple[Argument, ...]:
        """Where ids of a format count from, for keys and for values: of records of both from one address, and behind a
        key."""
        form = Format(format_)
        if not form.is_mixed:
            return _p(pool.keys, pool.values)
        key_bytes = form.keys.record_bytes(KvShape(1, pool.kv_heads, self.shape.head_dim, 2))
        return _p(pool.keys, pool.keys + key_bytes)

    def _warps_to_blocks(self, warps: int) -> int:
        return -(-warps // self.shape.warps)

    def _launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        stream: int,
        *arguments: Iterable[Argument],
        format_: str = "exact",
    ) -> None:
        flat = [argument for part in arguments for argument in part]
        self.prepare((format_,))
        self._modules[reader(format_)].launch(kernel, grid, 32 * self.shape.warps, stream, flat)


def _p(*addresses: int) -> tuple[Argument, ...]:
    return tuple(ctypes.c_void_p(address or None) for address in addresses)


def _i(*numbers: int) -> tuple[Argument, ...]:
    return tuple(ctypes.c_int32(number) for number in numbers)
