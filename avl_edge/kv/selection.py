"""Lists of selected rows: which tokens' rows of one format are meant, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .layout import Format
from .pool.rows import Ids, Index

_COLUMNS = ("order", "ids", "positions")


class Selected:
    """Rows of one format. ``order`` int64: where they stand among all that are meant (tokens, or rows to read);
    ``ids`` int32: where they lie in the pool; ``positions`` int32: those of their tokens.

    Two lists are equal where they are the same object.
    """

    def __init__(self, format_: str, order: Index, ids: Ids, positions: Ids) -> None:
        self.format = format_
        self.order = order
        self.ids = ids
        self.positions = positions

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def parts(self) -> Sequence[Selected]:
        """Lists that are this one, one behind the other."""
        return (self,)

    def at(self, order: Index) -> Selected:
        """The same rows at other indices."""
        return Selected(self.format, order, self.ids, self.positions)


class Concatenated(Selected):
    """Several lists of one format as one. They are joined where that is asked for: every layer of every sequence has
    such a list in every step, and most are only copied into a table."""

    def __init__(self, parts: Sequence[Selected]) -> None:
        self.format = parts[0].format
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def parts(self) -> Sequence[Selected]:
        return self._parts

    def __getattr__(self, name: str) -> npt.NDArray[np.integer]:
        """``order``, ``ids`` and ``positions``, when they are first asked for."""
        if name not in _COLUMNS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        joined: npt.NDArray[np.integer] = np.concatenate([getattr(each, name) for each in self._parts])
        setattr(self, name, joined)
        return joined


def is_low_rank(selected: Selected) -> bool:
    """Whether the rows are read over their layer's basis."""
    return Format(selected.format).rank is not None


def by_format(images: Sequence[Selected], text: Selected) -> list[Selected]:
    """Rows by formats: of one format, image rows before text rows. None without rows."""
    alike = [each for each in images if each.format == text.format]
    others = (each for each in images if each.format != text.format)
    joined = Concatenated([*alike, text]) if alike else text
    return [each for each in (joined, *others) if len(each)]
