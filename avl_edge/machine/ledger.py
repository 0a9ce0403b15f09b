"""What a process holds, by kind: entries with limits and use in bytes. What would exceed a limit is refused."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ..config import format_size
from ..errors import Busy, TooLarge

EntryName = Literal[
    "process",
    "libraries",
    "weights",
    "kv_pool",
    "activations",
    "features",
    "pixels",
    "decoding",
    "recorded_steps",
]
"""``process``: the process as it was before anything of ours was loaded; ``libraries``: what they take beside tensors
once they compute; ``weights``; ``kv_pool``: all rows; ``activations`` of prompts and steps; ``features`` and ``pixels``
of pictures; ``decoding`` of picture files; ``recorded_steps`` of a device."""


@dataclass(frozen=True)
class EntryStats:
    """Bytes of an entry: the most that it may hold (None: nothing but the machine bounds it), what it holds now, and
    the most that it held."""

    limit: int | None
    used: int
    peak: int


@dataclass(frozen=True)
class MemoryStats:
    """A ledger at one moment, in bytes. ``limit``: of all entries together; None where none was asked for."""

    limit: int | None
    entries: Mapping[EntryName, EntryStats]

    @property
    def used(self) -> int:
        """What all entries hold together."""
        return sum(entry.used for entry in self.entries.values())


class Entry:
    """One kind of memory. Each holder has an amount of its own; holding again replaces it, letting go twice is safe.

    Any thread may call it, and a finalizer in the middle of such a call: there is no lock. An amount is written down
    before it is compared with the limit, so that of two threads that compete for the last bytes both may be refused,
    and never both be served.
    """

    def __init__(self, name: str, limit: int | None = None) -> None:
        self.name = name
        self.limit = limit
        self.fixed = 0
        """Bytes that are taken for good."""
        self.peak = 0
        self._held: dict[Hashable, int] = {}

    @property
    def used(self) -> int:
        return self.fixed + sum(tuple(self._held.values()))

    @property
    def stats(self) -> EntryStats:
        used = self.used
        return EntryStats(self.limit, used, max(used, self.peak))

    def fits(self, nbytes: int) -> bool:
        """Whether so many bytes more are within the limit now."""
        return self.limit is None or self.used + nbytes <= self.limit

    def hold(self, holder: Hashable, nbytes: int, what: str) -> None:
        """Count ``nbytes`` for ``holder``, in the place of what it held.

        Raises :class:`TooLarge` where ``what`` is more than the entry may ever hold, :class:`Busy` where it is more
        than there is now; nothing has changed then.
        """
        before = self._held.get(holder)
        self._held[holder] = nbytes
        used = self.used
        if self.limit is None or used <= self.limit:
            self.peak = max(self.peak, used)
            return
        if before is None:
            self.release(holder)
        else:
            self._held[holder] = before
        self.require_possible(nbytes, what)
        raise Busy(
            f"there is no room now for {what} ({format_size(nbytes)}): of {format_size(self.limit)} for {self.name} "
            f"others hold {format_size(used - nbytes)}; ask again when they have ended"
        )

    def require_possible(self, nbytes: int, what: str) -> None:
        """Raise :class:`TooLarge` where ``what`` is more than the entry may ever hold."""
        if self.limit is not None and self.fixed + nbytes > self.limit:
            raise TooLarge(
                f"there is no room for {what} ({format_size(nbytes)}): {format_size(self.limit - self.fixed)} are all "
                f"that there is for {self.name}; ask for less at a time, or load with more memory"
            )

    def release(self, holder: Hashable) -> None:
        """Let go of what ``holder`` holds, if anything."""
        self._held.pop(holder, None)

    def clear(self) -> None:
        """Let go of everything."""
        self._held.clear()


class Ledger:
    """The entries of a process, and the ``limit`` of all of them together (None: none).

    Where there is one, the limits of the entries never add up to more; an entry without a limit of its own holds
    nothing until :meth:`divide` gives it one.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        own = None if limit is None else 0
        self._entries = {name: Entry(name.replace("_", " "), own) for name in get_args(EntryName)}

    def __getitem__(self, name: EntryName) -> Entry:
        return self._entries[name]

    def divide(self, limits: Mapping[EntryName, int]) -> None:
        """Set the limits of entries; ValueError where all of them would exceed that of the process."""
        after = {name: limits.get(name, entry.limit or 0) for name, entry in self._entries.items()}
        if self.limit is not None and sum(after.values()) > self.limit:
            raise ValueError(f"the entries' limits, {after}, exceed the {self.limit} bytes of the process")
        for name, limit in limits.items():
            self._entries[name].limit = limit

    @property
    def stats(self) -> MemoryStats:
        return MemoryStats(self.limit, {name: entry.stats for name, entry in self._entries.items()})
