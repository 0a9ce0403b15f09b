"""Who runs next: requests wait in order until the pool can promise their worst case, then run together."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from .budget import KvPlan
from .cache import SequenceCache
from .config import Options
from .policies import Method
from .pool import RowPool
from .prompt import Detokenizer
from .request import Prompt, Result, TokenEvent
from .sampler import Sampler


@dataclass(frozen=True)
class Request:
    """A request that was checked and planned; it holds no rows yet.

    ``max_new_tokens`` is the option's, cut where the model's context ends.
    """

    prompt: Prompt
    options: Options
    plan: KvPlan[Method]
    max_new_tokens: int


@dataclass(eq=False)
class Sequence:
    """A request on its way: what it has generated, what it holds, and when things happened (seconds)."""

    request: Request
    sampler: Sampler
    detokenizer: Detokenizer
    cache: SequenceCache | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    events: deque[TokenEvent] = field(default_factory=deque)
    result: Result | None = None
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    latest_token: float = 0.0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0


@dataclass(frozen=True)
class Work:
    """One step: a prompt to run through, or one token more for each of ``sequences``."""

    sequences: tuple[Sequence, ...]
    prefill: bool


class Scheduler:
    """First come, first served; a prompt that fits goes before the next decode step."""

    def __init__(self, pool: RowPool, layers: int) -> None:
        self._pool = pool
        self._layers = layers
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self._waiting.append(sequence)

    def next(self) -> Work | None:
        """What to do now; None when nothing is waiting or running."""
        if self._waiting and self._waiting[0].request.plan.peak_rows <= self._pool.rows_unreserved:
            sequence = self._waiting.popleft()
            request = sequence.request
            sequence.cache = SequenceCache(
                self._pool,
                request.plan.method,
                len(request.prompt),
                request.prompt.spans,
                self._layers,
                request.plan.peak_rows,
            )
            self._running.append(sequence)
            return Work((sequence,), prefill=True)
        return Work(tuple(self._running), prefill=False) if self._running else None

    def remove(self, sequence: Sequence) -> None:
        """Take a request out, wherever it stands, and free its rows. Safe to call twice."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        if sequence.cache:
            sequence.cache.close()
