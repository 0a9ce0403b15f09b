"""One call of ``avl::CoreAttention``: which kernels, on which addresses. What it computes is
`avl_edge.package.export`'s table.

Everything is decided by shapes, which the host knows; nothing is read back, allocated or waited for, so a CUDA graph
can hold the call. New rows are written into their slots first, a launch for each format. Then a decode step, one new
token for each sequence, takes the split kernels of `avl_edge.attention.cuda`, a launch for each format of its rows, and
any other call, a prompt, those for many tokens. float32 rows, which the split kernels do not know, take the latter
always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...attention.cuda import FORMATS, Gpu, Kernels, KernelShape, Lists, Module, Pool, Step, Workspace, cubin
from ...config import require
from .kernels import ROWS, TokenKernels, Tokens, TokenShape

_INT32 = 4


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a call: t ``tokens``, B ``sequences``, N ``room`` for row ids, W ``queries``, R ``pool_rows``,
    H ``heads``, H_kv ``kv_heads``, d ``head_dim``; L ``layers``; P ``parts``."""

    tokens: int
    sequences: int
    room: int
    queries: int
    pool_rows: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    parts: int = 1

    @property
    def formats(self) -> tuple[str, ...]:
        """Of the rows, part by part."""
        return tuple(FORMATS)[: self.parts]

    @classmethod
    def of(cls, inputs: Sequence[Sequence[int]]) -> Sizes:
        """From the shapes of the node's inputs, in their order; :class:`BadInput` for shapes that contradict it."""
        query, key, value, pool_keys, pool_values, rows, row_offsets, slots, token_offsets, queries, *words = map(
            tuple, inputs
        )
        tokens, heads, head_dim = query
        layers, room = rows
        kv_heads, sequences = key[1], token_offsets[0] - 1
        parts = slots[1] // tokens
        fits = (
            (key == value == (tokens, kv_heads, head_dim))
            and (pool_keys == pool_values and pool_keys[1:] == (kv_heads, head_dim))
            and (row_offsets == (layers, parts * sequences + 1) and slots == (layers, parts * tokens))
            and (words == [] or words == 2 * [(words[0][0], 4)])
            and 1 <= parts <= (len(FORMATS) if words else 1)
            and heads % kv_heads == 0
        )
        require(fits, f"avl::CoreAttention was given shapes {list(map(list, inputs))}: build the package again")
        return cls(tokens, sequences, room, queries[0], pool_keys[0], heads, kv_heads, head_dim, layers, parts)


class Attention:
    """The kernels for one head size, grouping and dtype; all layers and contexts share it."""

    def __init__(self, core: Kernels, tokens: TokenKernels) -> None:
        """``core`` writes rows whatever their dtype, and attends where it is that of ``tokens``."""
        self._core, self._tokens = core, tokens
        self._splits = core.shape.row == tokens.shape.row

    @classmethod
    def load(cls, head_dim: int, group: int, dtype: str) -> Attention:
        """On this machine's GPU, for rows of ``dtype`` (float16, bfloat16, float32).

        Raises :class:`~avl_edge.attention.cuda.NoCuda` and :class:`~avl_edge.attention.cuda.CompileFailed`.
        """
        gpu, is_wide = Gpu(), dtype == "float32"
        # A float32 row is written as one of twice as many heads of a 2-byte type.
        shape = KernelShape(head_dim, 1 if is_wide else group, "Half" if is_wide else ROWS[dtype])

        def load(format_: str) -> Module:
            return gpu.load(cubin(gpu.arch, shape, format_, newest=gpu.cuda))

        core = Kernels(load("exact"), shape, gpu.multiprocessors, load)
        return cls(core, TokenKernels.load(gpu, TokenShape(head_dim, group, ROWS[dtype])))

    def prepare(self, sizes: Sizes) -> None:
        """Have the kernels ready that a call within ``sizes`` launches: a compiler has no place in a capture.

        Raises :class:`BadInput` for packed rows in a float32 decoder, else as :meth:`load`.
        """
        require(
            sizes.parts == 1 or self._splits,
            "a float32 engine reads exact rows: build the package with --precision float16, or ask for exact formats",
        )
        self._core.prepare(sizes.formats)
        if not self._is_step(sizes):
            self._tokens.prepare(sizes.parts)

    def workspace_bytes(self, most: Sizes) -> int:
        """Bytes of device memory that a call within ``most`` needs, whichever way it goes."""
        steps = self._step_workspace(most, min(most.tokens, most.sequences), scores=True).bytes if self._splits else 0
        return max(steps, 4 * most.tokens * most.heads)

    def run(
        self, sizes: Sizes, layer: int, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Queue the call of ``layer`` on ``stream``: addresses of the node's inputs and outputs, in their order, and
        of :meth:`workspace_bytes` of scratch memory."""
        of = _tokens(sizes, layer, inputs)
        pool = _pool(of, sizes, widening=1 if self._splits else 2)
        for part, format_ in enumerate(sizes.formats):
            slots = of.slots + _INT32 * part * sizes.tokens
            self._core.append(of.key, of.value, slots, sizes.tokens, pool, stream, format_)
        if self._is_step(sizes):
            self._step(of, sizes, pool, outputs, workspace, stream)
        else:
            self._prompt(of, outputs, workspace, stream)

    def _is_step(self, sizes: Sizes) -> bool:
        return self._splits and sizes.tokens == sizes.sequences

    def _step(self, of: Tokens, sizes: Sizes, pool: Pool, outputs: Sequence[int], workspace: int, stream: int) -> None:
        core = self._core
        attended, row_scores, token_scores = outputs
        scores = sizes.queries > 0
        offsets = self._step_workspace(sizes, sizes.sequences, scores=scores)
        lists = Lists.of(of.rows, of.row_offsets, sizes.sequences, sizes.room, sizes.formats)
        asked = row_scores if scores and sizes.room else 0
        step = Step(of.query, of.key, of.value, of.slots, lists, attended, asked)
        core.attend_parts(step, pool, offsets, workspace, stream)
        self._tokens.join(of, attended, workspace + offsets.log_sums, token_scores if scores else 0, stream)
        if asked:
            core.score_parts(step, offsets, workspace, stream)
            self._tokens.sums(of, row_scores, stream)

    def _prompt(self, of: Tokens, outputs: Sequence[int], workspace: int, stream: int) -> None:
        attended, row_scores, token_scores = outputs
        self._tokens.attend(of, attended, workspace, stream)
        if of.queries:
            self._tokens.scores(of, workspace, row_scores, token_scores, stream)

    def _step_workspace(self, sizes: Sizes, batch: int, *, scores: bool) -> Workspace:
        # By the pool's size, not by the list's room: a sequence's sums must not depend on who else is in the batch.
        splits = self._core.splits(sizes.kv_heads, sizes.pool_rows)
        shape, parts = self._core.shape, sizes.parts
        return Workspace.of(shape, batch, sizes.heads, splits, sizes.room, scores=scores, parts=parts)


def _pool(of: Tokens, sizes: Sizes, widening: int = 1) -> Pool:
    heads, dim = sizes.kv_heads * widening, sizes.head_dim
    return Pool(of.pool_keys, of.pool_values, heads, heads * dim, dim, heads * dim, dim)


def _tokens(sizes: Sizes, layer: int, inputs: Sequence[int]) -> Tokens:
    """The tables that hold a line for each layer begin at that of this one."""
    query, key, value, pool_keys, pool_values, rows, row_offsets, slots, token_offsets, queries, *_ = inputs
    return Tokens(
        query,
        key,
        value,
        pool_keys,
        pool_values,
        rows + _INT32 * layer * sizes.room,
        row_offsets + _INT32 * layer * (sizes.parts * sizes.sequences + 1),
        slots + _INT32 * layer * sizes.parts * sizes.tokens,
        token_offsets,
        queries,
        sizes.tokens,
        sizes.sequences,
        sizes.parts,
        sizes.kv_heads,
        sizes.room,
        sizes.queries,
    )
