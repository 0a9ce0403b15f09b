"""What a row weighs in each format, and how rows of a format lie in a page. Arithmetic only.

The pool is two arenas, one for keys and one for values, cut into pages of :data:`PAGE_ROWS` rows in the model's dtype.
A page serves one format at a time. In the ``exact`` format a row's id is its number, so that an arena is a plain tensor
of rows. A packed row is a *record* of bytes, as long in the arena of keys as in that of values; its id is where the
record begins, in units of :data:`UNIT` bytes, so that a kernel needs no other address.

Where keys and values have formats of their own, as in ``int8/int4``, their records differ in length, and side by side
in two arenas they would leave a part of one unused. So there a row is one record, the values' right behind the keys',
in either arena: values lie right behind keys in memory, and ids count on from the one into the other. A kernel finds
both at the same id as ever, from two other addresses: where the memory begins, and as far behind as a key is long.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from ..config import Formats, KvShape, require
from ..errors import BadInput

PAGE_ROWS = 16
UNIT = 16
_LOW_RANK = re.compile(r"lowrank:([0-9]{1,5})(?:@([0-9]{1,5}))?(\+int8)?")


def groups(head_dim: int) -> int:
    """Groups of neighbouring dimensions of a head that share one scale in int4: of 32, or what divides the head."""
    return head_dim // math.gcd(head_dim, 32)


@dataclass(frozen=True)
class Format:
    """A format by name: ``exact``, ``int8``, ``int4``, ``int8/int4`` (keys and values), ``lowrank:R`` or
    ``lowrank:R@r``, these also with ``+int8``."""

    name: str

    @cached_property
    def keys(self) -> Format:
        """In which the keys are: itself, but for a format that names two."""
        return Format(self.name.partition("/")[0])

    @cached_property
    def values(self) -> Format:
        """In which the values are."""
        return Format(self.name.rpartition("/")[2])

    @property
    def is_mixed(self) -> bool:
        """Whether keys and values have formats of their own, and a row is one record of both."""
        return "/" in self.name

    @property
    def is_exact(self) -> bool:
        return self.name == "exact"

    @cached_property
    def rank(self) -> int | None:
        """R of a low-rank format: coefficients per row, of K and of V each."""
        match = _LOW_RANK.fullmatch(self.name)
        return int(match.group(1)) if match else None

    @property
    def read_rank(self) -> int:
        """How many of the coefficients are read: r, or all R."""
        match = _LOW_RANK.fullmatch(self.name)
        assert match is not None
        return int(match.group(2) or match.group(1))

    @property
    def packs_coefficients(self) -> bool:
        """Whether a low-rank format keeps its coefficients in int8."""
        return self.name.endswith("+int8")

    def record_bytes(self, shape: KvShape) -> int:
        """Bytes of one packed row's key, or of its value; a mixed format has none, but those of its two.

        int8: a scale per head, then the high and the low nibbles of all values; int4: a scale per group, then the
        nibbles; low rank: R coefficients in the model's dtype, or in int8 a scale and a byte each. Scales are float16.
        """
        heads, dim = shape.kv_heads, shape.head_dim
        if self.name == "int8":
            return padded(2 * heads) + padded(heads * dim // 2) * 2
        if self.name == "int4":
            return padded(2 * heads * groups(dim)) + padded(heads * dim // 2)
        assert self.rank is not None, f"{self.name} has no records"
        return self._coefficients(self.rank, shape)

    def _coefficients(self, count: int, shape: KvShape) -> int:
        """Bytes of a low-rank record up to so many coefficients."""
        return padded(2 + count if self.packs_coefficients else shape.itemsize * count)

    def coarse_bytes(self, shape: KvShape) -> int:
        """Bytes of one row that a coarse scan of its key reads: half of an int8 key and its scales, else the key."""
        heads, dim = shape.kv_heads, shape.head_dim
        if self.is_exact:
            return shape.row_bytes // 2
        if self.keys.name == "int8":
            return padded(2 * heads) + padded(heads * dim // 2)
        return self.keys.record_bytes(shape)

    @property
    def is_packed(self) -> bool:
        """Whether each row is quantised by itself: all formats but ``exact`` and low-rank ones."""
        return not self.is_exact and self.rank is None

    @property
    def basis_rows(self) -> int:
        """Exact rows that each layer of a sequence needs beside its packed ones: the basis of a low-rank format."""
        return self.rank or 0

    @property
    def basis_rows_read(self) -> int:
        """How many of them a step needs to read rows of this format."""
        return self.read_rank if self.rank else 0

    def read_bytes(self, shape: KvShape) -> int:
        """Bytes of one row that a step reads, K and V together; of a low-rank one, its record's begin."""
        return packing(self, shape).row_bytes if self.rank is None else 2 * self._coefficients(self.read_rank, shape)


def padded(count: int) -> int:
    """``count`` bytes, rounded up to whole units."""
    return -(-count // UNIT) * UNIT


@dataclass(frozen=True)
class Packing:
    """Rows of one format in a page.

    ``rows`` is how many, ``row_bytes`` what each weighs, K and V together. Their ids are one run, of which a page's
    begins at page * page_step and the next row's is row_step on; or two runs of half the rows each, the second in the
    other arena, arena_step on.
    """

    format: Format
    rows: int
    row_bytes: int
    page_step: int
    row_step: int
    run: int
    arena_step: int

    def ids(self, pages: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Ids of the rows in ``slots`` of ``pages``, which are broadcast together."""
        run, row = np.divmod(slots, self.run)
        ids: npt.NDArray[np.int64] = pages * self.page_step + run * self.arena_step + row * self.row_step
        return ids

    def places(self, ids: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Pages and slots of rows: what :meth:`ids` made these ids of."""
        run, rest = np.divmod(ids.astype(np.int64), self.arena_step)
        pages, steps = np.divmod(rest, self.page_step)
        return pages, run * self.run + steps // self.row_step


@lru_cache(maxsize=256)
def packing(format_: Format, shape: KvShape, pool_pages: int = 1) -> Packing:
    """How rows of ``format_`` lie in the pages of a pool of ``pool_pages`` for rows of ``shape``; how many there are
    changes ids alone, and :class:`BadInput` is raised where these would be no int32 (32 GiB of a mixed format)."""
    if format_.is_exact:
        return Packing(format_, PAGE_ROWS, shape.row_bytes, PAGE_ROWS, 1, PAGE_ROWS, max(pool_pages, 1) * PAGE_ROWS)
    half_page = page_bytes(shape) // 2
    keys, values = format_.keys.record_bytes(shape), format_.values.record_bytes(shape)
    step = keys + values if format_.is_mixed else keys
    run = half_page // step
    rows = 2 * run if format_.is_mixed else run
    units = half_page // UNIT
    last = max(pool_pages, 1) * units * (2 if format_.is_mixed else 1)
    require(last <= 2**31, f"rows in {format_.name} cannot be told apart in a pool this large: load with half of it")
    arena_step = min(max(pool_pages, 1) * units, 2**31 - 1)  # beyond the last id, which is an int32, by a record
    return Packing(format_, rows, keys + values, units, step // UNIT, run, arena_step)


def page_bytes(shape: KvShape) -> int:
    """Bytes of a page, keys and values together."""
    return PAGE_ROWS * shape.row_bytes


def smoothing_rows(formats: Formats) -> int:
    """Exact rows that each layer of a sequence needs for the smoothing of its keys: one where any row is packed."""
    return int(any(Format(name).is_packed for name in formats.by_tier().values()))


@lru_cache(maxsize=1024)
def can_hold(formats: Formats, shape: KvShape) -> bool:
    """Whether rows of ``shape`` can be stored in ``formats``."""
    try:
        check(formats, shape)
    except BadInput:
        return False
    return True


def check(formats: Formats, shape: KvShape) -> None:
    """Raise :class:`BadInput` where rows of ``shape`` cannot be stored in ``formats``."""
    bases = {name for name in formats.stored.by_tier().values() if Format(name).rank}
    require(
        len(bases) <= 1,
        "core and secondary rows share one low-rank basis: give both one rank, both with +int8 or without",
    )
    for tier, name in formats.by_tier().items():
        format_ = Format(name)
        if format_.is_exact:
            continue
        require(shape.head_dim % 2 == 0, f"rows of heads of size {shape.head_dim} cannot be packed: it is odd")
        width = shape.kv_heads * shape.head_dim
        if format_.rank is not None:
            require(
                format_.read_rank <= format_.rank <= width,
                f"the {tier} format {name} asks for more directions than there are: rows have {width}, and no more can "
                f"be read than are stored",
            )
        smaller = packing(format_, shape).row_bytes < shape.row_bytes
        require(smaller, f"the {tier} format {name} would be no smaller than this model's rows: give another one")
