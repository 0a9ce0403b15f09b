"""How the memory of a process divides when it is bounded: what every request needs first, then what pictures take,
then prompts, and the rows of all requests get the rest. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from ..config import format_size
from ..errors import TooLarge
from ..machine.ledger import EntryName
from ..model.prompt import DECODING_BYTES_PER_PIXEL, MAX_PIXELS

PIXELS_BYTES = 512 * 2**20
"""The most that the pixels of requests take which have not been encoded: 380 pictures of 336 x 336. More than that in
the queue is a client that fills it."""
_DECODING_BYTES = DECODING_BYTES_PER_PIXEL * MAX_PIXELS
_FEATURES_SHARE, _PIXELS_SHARE, _DECODING_SHARE = 16, 16, 8
"""Where memory is bounded, each has at most one part in so many of what weights and libraries leave."""


@dataclass(frozen=True)
class Workspace:
    """Bytes that a request takes beside its rows: ``prompt_bytes`` while its prompt and pictures run, ``step_bytes``
    from its first token to its end."""

    prompt_bytes: int = 0
    step_bytes: int = 0


@dataclass(frozen=True)
class ProcessMemory:
    """A process bounded to ``limit`` bytes, of which the others here are fixed.

    ``process``: what it held before; ``libraries``: what they will take beside tensors; ``conversions``: rows on their
    way into another format; ``most_features``: those of a context full of pictures.
    """

    limit: int
    process: int
    libraries: int
    weights: int
    recorded_steps: int
    conversions: int
    most_features: int

    @property
    def _fixed(self) -> int:
        return self.process + self.libraries + self.weights + self.recorded_steps + self.conversions

    def _shares(self, room: int) -> dict[EntryName, int]:
        return {
            "features": min(self.most_features, room // _FEATURES_SHARE),
            "pixels": min(PIXELS_BYTES, room // _PIXELS_SHARE),
            "decoding": min(_DECODING_BYTES, room // _DECODING_SHARE),
        }

    def _left(self, room: int) -> int:
        """What is left for prompts and rows."""
        return room - sum(self._shares(room).values())

    def kv_bytes(self, prompt_bytes: int) -> int:
        """What rows may take beside the workspace of a prompt; below 0 where not even that fits."""
        return self._left(max(0, self.limit - self._fixed)) - prompt_bytes

    def smallest(self, prompt_bytes: int, kv_bytes: int) -> int:
        """The least limit under which a prompt's workspace and so many bytes of rows fit."""
        need = prompt_bytes + kv_bytes
        # What is left grows with the room, and is half of it at least.
        return self._fixed + bisect_left(range(2 * need + 1), need, key=self._left)

    def require(self, prompt_bytes: int, kv_bytes: int, what: str) -> None:
        """Raise :class:`TooLarge`, naming the least that would do, where ``what`` does not fit."""
        if self.kv_bytes(prompt_bytes) < kv_bytes:
            least = self.smallest(prompt_bytes, kv_bytes)
            raise TooLarge(
                f"a process of {format_size(self.limit)} ({self.limit} bytes) does not hold {what}: the smallest that "
                f"would do is {format_size(least)} ({least} bytes), {self._explained(prompt_bytes)}; raise --max-memory"
            )

    def _explained(self, prompt_bytes: int) -> str:
        parts = {
            "the program": self.process + self.libraries,
            "weights": self.weights,
            "a prompt": prompt_bytes + self.conversions,
        }
        return ", ".join(f"{format_size(nbytes)} of it for {what}" for what, nbytes in parts.items())

    def limits(self, kv_bytes: int) -> dict[EntryName, int]:
        """Of all entries, with a pool of so many bytes: prompts have what it leaves."""
        room = max(0, self.limit - self._fixed)
        return {
            "process": self.process,
            "libraries": self.libraries,
            "weights": self.weights,
            "recorded_steps": self.recorded_steps,
            **self._shares(room),
            "kv_pool": kv_bytes,
            "activations": self.conversions + self._left(room) - kv_bytes,
        }
