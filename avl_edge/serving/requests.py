"""A request: as it was planned, and on its way; and the prefix of an image session, which several share."""

from __future__ import annotations

import time
from collections.abc import Container, Generator
from dataclasses import dataclass, field

from torch import Tensor

from ..config import Options
from ..kv.budget import KvPlan
from ..kv.cache import SequenceCache
from ..kv.methods import Method
from ..kv.shared_prefix import SharedPrefixCache
from ..model.sampling import Sampler
from ..model.stop_strings import TextStream
from ..planning.process_memory import Workspace
from ..request import DeviceStats, Logprobs, Pixels, PressureStats, Prompt, Result, TokenEvent
from .event_stream import EventStream
from .failure import Failure


@dataclass(eq=False)
class SharedPrefix:
    """The prefix of an image session, which its questions share: ``prompt``, without its pixels, ends with its last
    image, ``plan`` counts its rows, ``home`` is the runtime in whose pool they are.

    ``cache`` has them from the admission of its first question until it was closed and its last question has ended;
    ``is_ready``: they are written. ``pixels`` are there for the questions that come until then. ``runner`` is the
    question that is running it now. Closed, it takes no more questions. ``is_spare``: it may be closed where others
    need its rows and no question about it is on its way, those first whose last question came longest ago (``used``,
    seconds of perf_counter).
    """

    prompt: Prompt
    plan: KvPlan[Method]
    home: object
    pixels: Pixels | None = None
    cache: SharedPrefixCache | None = None
    runner: Running | None = None
    is_ready: bool = False
    is_closed: bool = False
    is_spare: bool = False
    used: float = 0.0
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
    then counts what it adds to them. ``workspace``: what it takes beside its rows.
    """

    prompt: Prompt
    options: Options
    plan: KvPlan[Method]
    max_new_tokens: int
    device: DeviceStats | None = None
    prefix: SharedPrefix | None = None
    workspace: Workspace = field(default_factory=Workspace)

    @property
    def plans(self) -> tuple[KvPlan[Method], ...]:
        """What has to be there for it, shared rows included."""
        return (self.plan, self.prefix.plan) if self.prefix else (self.plan,)


@dataclass(eq=False)
class Running:
    """A request on its way: what it has generated, what it holds, and when things happened (seconds).

    ``request`` is without its pixels: ``pixels`` has them until they are encoded, or the request has ended.
    ``priority`` and ``due`` (on the clock of ``submitted``; None: whenever) are for the schedule. ``prompt_task``: its
    prompt, half-way. ``events`` go to its caller, who reads ``result`` and ``failure``, what ended it before its time,
    once they have ended. ``pressure``: what it gave while memory was short. ``held``: the scheduler's clock of held
    time (seconds) when the request came, and when it was admitted.
    """

    request: Request
    sampler: Sampler
    text_stream: TextStream
    priority: int = 0
    due: float | None = None
    pixels: Pixels | None = None
    cache: SequenceCache | None = None
    prompt_task: Generator[None, None, Tensor | None] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    text: str = ""
    events: EventStream = field(default_factory=EventStream)
    result: Result | None = None
    failure: Failure | None = None
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
        self.events.put(TokenEvent(token, text, reason, logprobs))
        return reason
