"""Who runs next: requests wait in order until the pool can promise their worst case, then run together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from ..config import Options, format_size, require
from ..errors import DoesNotFit
from ..kv.budget import KvPlan
from ..kv.cache import SequenceCache
from ..kv.methods import Method
from ..kv.pool import RowPool
from ..kv.shared_prefix import QuestionCache, SharedPrefixCache
from ..model.sampling import Sampler
from ..model.stop_strings import TextStream
from ..request import DeviceStats, Logprobs, PressureStats, Prompt, Result, TokenEvent

NO_ROOM = (
    "open image sessions hold the rows that this needs, and nobody is running: close one, or load with a larger pool"
)
"""Why :attr:`Scheduler.stuck` is refused."""


@dataclass(eq=False)
class SharedPrefix:
    """The prefix of an image session, which its questions share: ``prompt`` ends with its last image, ``plan`` counts
    its rows, ``home`` is the runtime in whose pool they are.

    ``cache`` has them from the admission of its first question until it was closed and its last question has ended;
    ``is_ready``: they are written. Closed, it takes no more questions.
    """

    prompt: Prompt
    plan: KvPlan[Method]
    home: object
    cache: SharedPrefixCache | None = None
    is_ready: bool = False
    is_closed: bool = False
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0

    @property
    def share(self) -> float:
        """The percentage of image rows that are stored."""
        percent = self.plan.method.shared_percent
        assert percent is not None, "a shared prefix is planned with a method whose rows may be shared"
        return percent


@dataclass(frozen=True)
class Request:
    """A request that was checked and planned; it holds no rows yet.

    ``max_new_tokens`` is the option's, cut where the model's context ends; 0 asks for an image session's rows alone.
    ``device``: what it was planned for. ``prefix``: the picture whose rows it shares with other questions; ``plan``
    then counts what it adds to them.
    """

    prompt: Prompt
    options: Options
    plan: KvPlan[Method]
    max_new_tokens: int
    device: DeviceStats | None = None
    prefix: SharedPrefix | None = None

    @property
    def plans(self) -> tuple[KvPlan[Method], ...]:
        """What has to be there for it, shared rows included."""
        return (self.plan, self.prefix.plan) if self.prefix else (self.plan,)


@dataclass(eq=False)
class Running:
    """A request on its way: what it has generated, what it holds, and when things happened (seconds).

    ``result`` is set after the last event; ``error`` is what ended it before its time, for its own caller.
    ``pressure``: what it gave while memory was short. ``held``: the scheduler's clock of held time (seconds) when the
    request came, and when it was admitted.
    """

    request: Request
    sampler: Sampler
    text_stream: TextStream
    cache: SequenceCache | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    text: str = ""
    events: deque[TokenEvent] = field(default_factory=deque)
    result: Result | None = None
    error: Exception | None = None
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    latest_token: float = 0.0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    pressure: PressureStats = field(default_factory=PressureStats)
    held: tuple[float, float | None] = (0.0, None)

    @property
    def admitted_cache(self) -> SequenceCache:
        """``cache`` of a request that was admitted."""
        assert self.cache is not None, "a request runs only once it was admitted"
        return self.cache

    def push(self, token: int, ends: Container[int]) -> str | None:
        """Its next token, and the event of it. Why the answer ends here: ``stop`` for one of ``ends`` or a stop string,
        ``length``; None where it goes on."""
        self.latest_token = time.perf_counter()
        if not self.token_ids:
            self.first_token = self.latest_token
        self.token_ids.append(token)
        text = self.text_stream.push(token)
        reason = None
        if token in ends:
            reason = "stop"
        elif len(self.token_ids) == self.request.max_new_tokens:
            reason = "length"
        if reason:
            text += self.text_stream.finish()
        if self.text_stream.stop_string is not None:
            reason = "stop"
        self.text += text
        logprobs = self.sampler.logprobs
        if logprobs:
            self.logprobs.append(logprobs)
        self.events.append(TokenEvent(token, text, reason, logprobs))
        return reason


@dataclass(frozen=True)
class Work:
    """One step: a prompt to run through, or one token more for each of ``sequences``."""

    sequences: tuple[Running, ...]
    prefill: bool


class Scheduler:
    """First come, first served, but for who would wait for open image sessions; a prompt that fits goes before the next
    decode step."""

    def __init__(self, pool: RowPool, layers: int) -> None:
        self._pool = pool
        self._layers = layers
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._prefixes: list[SharedPrefix] = []  # those that have rows, or are about to
        self._held_since: float | None = None
        self._held_seconds = 0.0

    @property
    def running(self) -> tuple[Running, ...]:
        """The requests that hold rows: not one that was let in by a step that an interrupt ended at once."""
        return tuple(each for each in self._running if each.cache)

    @property
    def waiting(self) -> tuple[Running, ...]:
        """The requests that wait to be admitted, the first one first."""
        return tuple(self._waiting)

    @property
    def prefixes(self) -> tuple[SharedPrefix, ...]:
        """The pictures of image sessions that have rows, or are about to."""
        return tuple(self._prefixes)

    @property
    def is_held(self) -> bool:
        """Whether requests wait because of :meth:`hold`."""
        return self._held_since is not None

    def hold(self) -> None:
        """Admit nobody until :meth:`resume`. Who runs goes on."""
        if self._held_since is None:
            self._held_since = time.perf_counter()

    def resume(self) -> None:
        """Admit again."""
        self._held_seconds, self._held_since = self._held_clock(), None

    def _held_clock(self) -> float:
        """Seconds in which nobody was admitted, so far."""
        now = 0.0 if self._held_since is None else time.perf_counter() - self._held_since
        return self._held_seconds + now

    def waited_ms(self, sequence: Running) -> float:
        """How long a request waited because of :meth:`hold`, milliseconds."""
        begin, end = sequence.held
        return 1000 * ((self._held_clock() if end is None else end) - begin)

    def require_room(self, request: Request) -> None:
        """Raise :class:`DoesNotFit` for a request that even an empty pool could not hold."""
        if sum(plan.pages for plan in request.plans) > self._pool.pages:
            peak = sum(plan.peak_bytes for plan in request.plans)
            raise DoesNotFit(
                f"the request may hold {format_size(peak)}, but the whole pool has "
                f"{format_size(self._pool.pages * self._pool.page_bytes)}: load with a larger pool or give the request "
                f"a KV budget"
            )

    def add(self, sequence: Running) -> None:
        """Queue a request; :class:`BadInput` for a question about an image session that was closed."""
        prefix = sequence.request.prefix
        require(not (prefix and prefix.is_closed), "the session is closed: open the pictures again to ask about them")
        sequence.held = (self._held_clock(), None)
        self._waiting.append(sequence)

    @property
    def waits(self) -> bool:
        """Whether somebody waits to be admitted."""
        return bool(self._waiting)

    def next(self) -> Work | None:
        """What to do now; None when nothing is running or can be admitted."""
        sequence = self._begun() or (None if self.is_held else self._first())
        if sequence:
            # In both lists for a moment, rather than in none: an interrupt may fall in between.
            if sequence not in self._running:
                self._running.append(sequence)
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            return Work((sequence,), prefill=True)
        return Work(tuple(self._running), prefill=False) if self._running else None

    def _begun(self) -> Running | None:
        """Who was let in by a step that an interrupt ended before it did anything."""
        return next((each for each in self._running if each.cache is None), None)

    def _first(self) -> Running | None:
        """Who is admitted now: the first of the queue if it fits. Where nobody runs, whose end it could wait for, the
        first that fits: a question about an image session that holds the rows, and may be the last one about it."""
        candidates = tuple(self._waiting)[: 1 if self._running else None]
        return next((each for each in candidates if self._fits(each.request)), None)

    def _fits(self, request: Request) -> bool:
        plans = request.plans if request.prefix and not request.prefix.is_ready else (request.plan,)
        return sum(plan.pages for plan in plans) <= self._pool.pages_unreserved

    @property
    def stuck(self) -> Running | None:
        """Who waits in vain where :meth:`next` finds nobody: no request's end makes room, as open image sessions hold
        the rows."""
        return self._waiting[0] if self._waiting and not self._running and not self.is_held else None

    def admit(self, sequence: Running) -> SequenceCache:
        """The cache of a sequence whose prompt runs now, under a lease of its worst case; of a question about an image
        session once :meth:`admit_prefix` has made the prefix's cache."""
        request = sequence.request
        prompt, shared = request.prompt, request.prefix.cache if request.prefix else None
        sequence.held = (sequence.held[0], self._held_clock())
        if shared:
            sequence.cache = QuestionCache(shared, request.plan, len(prompt), prompt.spans)
        else:
            sequence.cache = SequenceCache(self._pool, request.plan, len(prompt), prompt.spans, self._layers)
        return sequence.cache

    def admit_prefix(self, prefix: SharedPrefix) -> SharedPrefixCache:
        """The cache of an image session whose first question is admitted, under a lease of its worst case."""
        # Listed before there is anything to free: an interrupt may fall in between.
        self._prefixes.append(prefix)
        prefix.cache = SharedPrefixCache(self._pool, prefix.plan, len(prefix.prompt), prefix.prompt.spans, self._layers)
        return prefix.cache

    def remove(self, sequence: Running) -> None:
        """Take a request out, wherever it stands, and free its rows. Safe to call twice."""
        self._forget((sequence,))
        if sequence.cache:
            sequence.cache.close()
        self.free_image_sessions()

    def free_image_sessions(self) -> None:
        """Free the rows of image sessions that were closed, where no question about them is on its way."""
        for prefix in tuple(self._prefixes):
            # Asked one by one: freeing an image session may have the garbage collector drop, and so free, another.
            if prefix in self._prefixes and not self._is_wanted(prefix):
                self._prefixes.remove(prefix)
                if prefix.cache:
                    prefix.cache.close()
                    prefix.cache, prefix.is_ready = None, False

    def _is_wanted(self, prefix: SharedPrefix) -> bool:
        asked = any(other.request.prefix is prefix for other in (*self._waiting, *self._running))
        return asked or not prefix.is_closed

    def drop(self, sequences: Sequence[Running]) -> None:
        """Take out requests whose step broke off anywhere; the pool's books are made anew from the others."""
        self._forget(sequences)
        for sequence in sequences:
            sequence.cache = None
        for prefix in self._prefixes:
            if not (prefix.is_ready and self._is_wanted(prefix)):
                prefix.cache, prefix.is_ready = None, False
        self._prefixes = [prefix for prefix in self._prefixes if prefix.cache]
        caches = (*(other.cache for other in self._running), *(prefix.cache for prefix in self._prefixes))
        self._pool.rebuild(cache.rows for cache in caches if cache)

    def _forget(self, sequences: Sequence[Running]) -> None:
        for sequence in sequences:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            if sequence in self._running:
                self._running.remove(sequence)
