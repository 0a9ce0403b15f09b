"""What the kernels are pointed to: addresses of device memory, sizes, and where a step's scratch memory is cut.

B sequences, H query and H_kv key/value heads, d head size, P parts (row formats) of a list, S splits of each, R rows of
the pool, ``capacity`` entries in the list of rows. Pointers are ``int`` addresses of device memory, 16-byte aligned, 0
for null; "row" is the kernels' type, float16 or bfloat16. What a pointer names is contiguous unless a stride is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from .compile import KernelShape

_INT32 = 4


def aligned(count: int) -> int:
    """``count`` bytes, up to where another part of a workspace may begin."""
    return -(-count // 256) * 256


@dataclass(frozen=True)
class Pool:
    """Where rows lie: ``keys`` and ``values``, row ``[R, H_kv, d]`` each; strides in elements, multiples of 8.

    Packed rows are records in the same memory, which has no gaps then, and in which values lie right behind keys."""

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
class Lists:
    """What ``batch`` sequences read: ``rows`` int32 ``[capacity]``, ids, of which sequence b reads, of the part in
    ``formats[p]``, those from ``begins[p, b]`` to ``ends[p, b] - 1``; both int32 ``[P, B]``."""

    rows: int
    begins: int
    ends: int
    batch: int
    capacity: int
    formats: tuple[str, ...] = ("exact",)

    @classmethod
    def of(cls, rows: int, offsets: int, batch: int, capacity: int, formats: tuple[str, ...] = ("exact",)) -> Lists:
        """Where each list ends as the next one begins: ``offsets`` int32 ``[P * B + 1]``."""
        return cls(rows, offsets, offsets + _INT32, batch, capacity, formats)

    def part(self, number: int) -> tuple[int, int]:
        """Begins and ends of one part."""
        return self.of_part(self.begins, number), self.of_part(self.ends, number)

    def of_part(self, table: int, number: int) -> int:
        """Where the line of a part begins in an int32 table ``[P, B]``."""
        return table + _INT32 * number * self.batch


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of one layer's attention, the next layer's too: byte offsets into one buffer of ``bytes``."""

    heads: int
    splits: int
    sums: int
    states: int
    log_sums: int
    weights: int
    logits: int
    bytes: int

    @classmethod
    def of(
        cls,
        shape: KernelShape,
        batch: int,
        heads: int,
        splits: int,
        capacity: int,
        *,
        scores: bool,
        parts: int = 1,
        scanned: int = 0,
        low_rank: bool = False,
    ) -> Workspace:
        """Float32 sums ``[B, P * S, H, d]``, states ``[B, P * S, H, 2]``, log_sums ``[B, H]``, weights ``[scanned]``;
        with ``scores`` or ``low_rank`` parts also logits ``[H, capacity]``, and ``[H, scanned]`` in any case."""
        results = batch * parts * splits * heads
        logits = max(capacity if scores or low_rank else 0, scanned)
        sizes = (4 * results * shape.head_dim, 8 * results, 4 * batch * heads, 4 * scanned, 4 * heads * logits)
        offsets = [0]
        for size in sizes:
            offsets.append(aligned(offsets[-1] + size))
        return cls(heads, splits, *offsets)


@dataclass(frozen=True)
class Scan:
    """How a step chooses among rows by a coarse scan of their keys, before it attends.

    ``lists``: the candidates, in parts as those of the step, a sequence's in one part at most; ``formats``: the parts
    that have any; ``limits`` int32 ``[B, 2]``: the share of the weight to hold, in 2^-30 (2^30: as many rows as may
    be), and the most rows; ``listed`` int32 ``[P, B]``: where the step's lists end that hold no chosen row. Results are
    those lists' ids and ``ends``, and ``picked`` int8 ``[capacity of lists]``: 1 for the candidates that were chosen.
    """

    lists: Lists
    formats: tuple[str, ...]
    limits: int
    listed: int
    picked: int


@dataclass(frozen=True)
class Bases:
    """What a step's low-rank rows are rebuilt with.

    ``ids`` int32 ``[B, rank]``: the exact rows that are each sequence's basis, of which its parts read the first ones;
    ``positions`` int32 ``[capacity]`` of the listed rows; ``angles`` row ``[context, 2, d / 2]``: RoPE's cosines and
    sines by position.
    """

    ids: int
    rank: int
    positions: int
    angles: int


@dataclass(frozen=True)
class Step:
    """Pointers of one layer of a decode step.

    ``query`` row ``[B, H, d]``; ``new_keys``, ``new_values`` row ``[B, H_kv, d]``; ``slots`` int32 ``[P, B]``, the id
    of each new token's row in the part of its format, negative: none; ``lists``: what each sequence reads, its new
    token's row among them; ``out`` row ``[B, H, d]``, zeros for a sequence that reads nothing; ``scores`` float32
    ``[capacity]``, or 0 where nobody asks; ``written``: the formats in which there are new rows; ``scan``: where rows
    are chosen within the step; ``bases``: where parts are low-rank; ``smoothing`` int32 ``[B]``: the exact rows by
    which queries and new keys are smoothed, in place (:mod:`avl_edge.kv.smoothing`), negative: none, or 0 where no
    sequence has one.
    """

    query: int
    new_keys: int
    new_values: int
    slots: int
    lists: Lists
    out: int
    scores: int = 0
    written: tuple[str, ...] = ("exact",)
    scan: Scan | None = None
    bases: Bases | None = None
    smoothing: int = 0


@dataclass(frozen=True)
class PromptHeads:
    """A prompt's queries or keys: element (token, head, i) at ``address + token_stride * token + head_stride * head +
    i``, strides in elements, multiples of 8. So ``[n, H, d]`` and ``[H, n, d]`` both do. Of queries only those at the
    positions that are asked for are read: tokens before them need not be there, but in the ``address``."""

    address: int
    token_stride: int
    head_stride: int
