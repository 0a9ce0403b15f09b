"""What travels through the runtime: the prepared prompt, token events and the closing statistics."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import Picture


@dataclass(frozen=True)
class ImageSpan:
    """Where one image's tokens stand in the prompt: positions ``start .. start + length - 1``."""

    digest: str
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class PixelValues:
    """A preprocessed picture, as its family's vision encoder takes it: float32 ``values`` of any shape."""

    values: npt.NDArray[np.float32]
    picture: Picture

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


@dataclass(frozen=True, eq=False)
class Pixels:
    """The preprocessed ``pictures`` of a prompt, an entry for each of its spans."""

    pictures: tuple[PixelValues, ...]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.pictures)


@dataclass(frozen=True, eq=False)
class RopePositions:
    """Where RoPE turns the tokens of a prompt to: ``coordinates`` int32 ``[axes, n]`` (time, row and column for
    M-RoPE), and on all axes ``next`` for the first token after them, which need not be ``n``."""

    coordinates: npt.NDArray[np.int32]
    next: int


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model.

    ``token_ids`` holds every position, image placeholders already expanded; ``pixel_values`` has an entry for each of
    the ``spans``, and is None without images, and where they were let go. ``rope`` is None where a token's position is
    its place in the prompt. ``notes``: what a person should know of how it was read, each one line.
    """

    token_ids: tuple[int, ...]
    spans: tuple[ImageSpan, ...]
    pixel_values: Pixels | None
    rope: RopePositions | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def coordinates(self) -> npt.NDArray[np.int32]:
        """The RoPE positions of all tokens: int32 ``[axes, n]``."""
        return np.arange(len(self), dtype=np.int32)[None] if self.rope is None else self.rope.coordinates

    def up_to_images(self) -> Prompt:
        """The same up to the end of the last image: what does not depend on what is asked about it."""
        end = self.spans[-1].start + self.spans[-1].length
        rope = self.rope
        if rope is not None:
            before = rope.coordinates[:, :end]
            rope = RopePositions(before, int(before.max()) + 1)
        return replace(self, token_ids=self.token_ids[:end], rope=rope)


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model held a token to be: the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Logprobs(TokenLogprob):
    """Of a generated token, and of the ``top`` likeliest ones in its place, the likeliest first.

    They are the model's own, before bias, penalties, temperature and what follows it.
    """

    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. ``text`` is what became readable with it, often one word piece, possibly empty.

    ``finish_reason`` is None until the last event: ``stop`` (the model ended, or a stop string is complete) or
    ``length`` (the limit). ``logprobs`` where the request asks for them.
    """

    token_id: int
    text: str
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Timings:
    """Wall-clock times of one request, milliseconds; ``decode_ms_per_token`` is 0 for a single token."""

    load_ms: float
    encode_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms_per_token: float
    tokens_per_s: float


@dataclass(frozen=True)
class PressureStats:
    """What a request gave for others while memory was short.

    ``demotions``: how many times its image rows went into a smaller format; ``rows_evicted``: rows given up, over all
    layers; ``waited_ms``: how long it was not admitted because of it; ``bytes_given_back`` to the operating system.
    """

    demotions: int = 0
    rows_evicted: int = 0
    waited_ms: float = 0.0
    bytes_given_back: int = 0


@dataclass(frozen=True)
class KvStats:
    """What the pool held for one request, in bytes, measured from the pool.

    ``bytes_full`` is what full attention would hold for the same tokens at the end, ``bytes_stored`` what the rows held
    then weigh in their formats, ``bytes_peak`` the pages of the pool that were held at the fullest moment. Of a
    question about an image session these two are its own rows, and ``bytes_shared`` what those of its session weigh,
    which all its questions read and the pool holds once; ``layers`` counts both. ``rows_read_fraction`` is of full
    attention's rows over the decode steps (1 when there were none), and ``bytes_read_fraction`` of its bytes, coarse
    scans included. ``layers`` counts rows per tier at the end.
    """

    bytes_full: int
    bytes_stored: int
    bytes_peak: int
    bytes_budget: int | None
    rows_read_fraction: float
    bytes_read_fraction: float
    refreshes: int
    layers: tuple[dict[str, int], ...]
    pressure: PressureStats = PressureStats()
    bytes_shared: int = 0


@dataclass(frozen=True)
class ImageSessionStats:
    """What an image session's tokens are, and what their rows hold in the pool (0 bytes and ms before they are there).

    ``bytes_stored`` is what the rows weigh, ``bytes_peak`` the pages of the pool that they take, ``bytes_budget`` what
    they were held to. ``encode_ms`` and ``prefill_ms`` were spent once, for all questions.
    """

    tokens: int
    image_tokens: int
    formats: dict[str, str]
    bytes_stored: int
    bytes_peak: int
    bytes_budget: int | None
    encode_ms: float
    prefill_ms: float


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; ``prompt_tokens`` includes ``image_tokens``."""

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class DeviceStats:
    """What the machine was when a request was planned: the name of the ``profile`` that it was planned from (None: none
    is for the machine), the power mode, and the thermal alerts that slow it down. ``changed`` says in words what is
    other than for the request before."""

    profile: str | None
    power_mode: str | None = None
    throttling: tuple[str, ...] = ()
    changed: str | None = None


@dataclass(frozen=True)
class Result:
    """A finished (or closed) request. ``formats`` are those at its end; ``device`` is None where none is followed.

    ``stop_string`` is the one that ended the answer: ``text`` ends before it, while ``token_ids`` has its tokens.
    ``logprobs`` are those of ``token_ids``, where they were asked for. ``seed`` is that of the draws; None where there
    were none. ``notes``: what a person should know of how the request was read, each one line.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    model: str
    backend: str
    method: str
    settings: dict[str, Any]
    formats: dict[str, str]
    usage: Usage
    timings: Timings
    kv: KvStats
    device: DeviceStats | None = None
    stop_string: str | None = None
    logprobs: tuple[Logprobs, ...] | None = None
    seed: int | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The document that ``avl-edge run --json`` prints."""
        return asdict(self)
