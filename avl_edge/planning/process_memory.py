"""How the memory of a process divides when it is bounded: what every request needs first, then what pictures take,
then prompts, and the rows of all requests get the rest. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from ..config import format_size
from ..errors import TooLarge
from ..machine.ledger import EntryName
from ..model.images import DECODING_BYTES_PER_PIXEL, MAX_PIXELS

PIXELS_BYTES = 512 * 2**20
"""The most that the pixels of requests take that have not been encoded, a few more where memory is bounded: 380
pictures of 336 x 336. More than that in the queue is a client that fills it."""
_DECODING_BYTES = DECODING_BYTES_PER_PIXEL * MAX_PIXELS
_LEAST_DECODING_BYTES = DECODING_BYTES_PER_PIXEL * 10**6
"""However small a process is, a picture of a megapixel can be read."""
_PICTURES = 4
"""However small a process is, there is room for the pixels of one picture, which are there twice while it is read, and
of another one."""
_FEATURES_SHARE, _PIXELS_SHARE, _DECODING_SHARE = 16, 16, 8
"""Where memory is bounded, each has at most one part in so many of what weights and libraries leave, a multiple of
:data:`_UNIT` bytes: so shares are whole, and what is left never falls as there is more."""
_UNIT = 16


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
    way into another format; ``picture``: pixels of one; ``most_features``: those of a context full of pictures.
    """

    limit: int
    process: int
    libraries: int
    weights: int
    recorded_steps: int
    conversions: int
    picture: int
    most_features: int

    @property
    def _fixed(self) -> int:
        pictures = _PICTURES * self.picture + _LEAST_DECODING_BYTES
        return self.process + self.libraries + self.weights + self.recorded_steps + self.conversions + pictures

    def _shares(self, room: int) -> dict[EntryName, int]:
        return {
            "features": min(self.most_features, room // _FEATURES_SHARE),
            "pixels": min(PIXELS_BYTES, room // _PIXELS_SHARE),
            "decoding": min(_DECODING_BYTES - _LEAST_DECODING_BYTES, room // _DECODING_SHARE),
        }

    def _left(self, room: int) -> int:
        """What is left for prompts and rows."""
        return room - sum(self._shares(room).values())

    def _pixels(self, room: int) -> int:
        return _PICTURES * self.picture + self._shares(room)["pixels"]

    @property
    def _room(self) -> int:
        return max(0, self.limit - self._fixed) // _UNIT * _UNIT

    def kv_bytes(self, prompt_bytes: int) -> int:
        """What rows may take beside the workspace of a prompt; below 0 where not even that fits."""
        return self._left(self._room) - prompt_bytes

    def smallest(self, prompt_bytes: int, kv_bytes: int, pixel_bytes: int = 0) -> int:
        """The least limit under which the workspace of a prompt, so many bytes of rows and of pixels fit."""
        need = prompt_bytes + kv_bytes
        rooms = range(0, 2 * need + _PIXELS_SHARE * pixel_bytes + 2 * _UNIT, _UNIT)  # half of a room is left at least
        places = (bisect_left(rooms, need, key=self._left), bisect_left(rooms, pixel_bytes, key=self._pixels))
        return self._fixed + rooms[max(places)]

    def require(self, prompt_bytes: int, kv_bytes: int, what: str, pixel_bytes: int = 0) -> None:
        """Raise :class:`TooLarge`, naming the least that would do, where ``what`` does not fit."""
        least = self.smallest(prompt_bytes, kv_bytes, pixel_bytes)
        if self.limit < least:
            raise TooLarge(
                f"a process of {format_size(self.limit)} ({self.limit} bytes) does not hold {what}: the smallest that "
                f"would do is {format_size(least)} ({least} bytes), {self._explained(prompt_bytes)}; raise --max-memory"
            )

    def _explained(self, prompt_bytes: int) -> str:
        parts = {
            "the program": self.process + self.libraries,
            "weights": self.weights,
            "a prompt and a picture": self._fixed - self.process - self.libraries - self.weights + prompt_bytes,
        }
        return ", ".join(f"{format_size(nbytes)} of it for {what}" for what, nbytes in parts.items())

    def limits(self, kv_bytes: int) -> dict[EntryName, int]:
        """Of all entries, with a pool of so many bytes: prompts have what it leaves."""
        room, shares = self._room, self._shares(self._room)
        return {
            "process": self.process,
            "libraries": self.libraries,
            "weights": self.weights,
            "recorded_steps": self.recorded_steps,
            **shares,
            "pixels": self._pixels(room),
            "decoding": _LEAST_DECODING_BYTES + shares["decoding"],
            "kv_pool": kv_bytes,
            "activations": self.conversions + self._left(room) - kv_bytes,
        }
