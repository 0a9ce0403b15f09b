"""What a monitor reads at ``/metrics``: vLLM's names where it has one, and what nobody else counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .answer import Answer
from .refusals import Refusal

PREFIX = "avl_edge:"
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WEIGHT = 0.1


@dataclass(frozen=True)
class Moment:
    """How things stand when somebody looks: requests, shares of the pool (0 to 1), bytes."""

    running: int = 0
    waiting: int = 0
    on_their_way: int = 0
    connections: int = 0
    pool_bytes: int = 0
    pool_bytes_promised: int = 0
    pool_bytes_in_use: int = 0
    tier_bytes: Mapping[str, int] = field(default_factory=dict)
    held_pictures: int = 0
    held_picture_bytes: int = 0
    sent_picture_bytes: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    memory_limit: int | None = None
    available_bytes: int | None = None
    stall_percent: float | None = None
    is_ready: bool = False
    power_mode: str | None = None


class Metrics:
    """Counts of one service, whose model is called ``model_name``. Of one event loop."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model_name
        self.usual_seconds = 1.0
        """What an answer took lately, on average."""
        self._gauges: dict[str, Gauge] = {}
        self._ttft = self._histogram("time_to_first_token_seconds", "From a request to its first token.", _SECONDS)
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.", _STEPS)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From a request to its last token.", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Until its pictures or prompt began.", _SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "Of its pictures and prompt.", _SECONDS)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")
        self._reused = self._counter("prompt_tokens_cached", "Tokens of prompts whose rows were there already.")
        self._success = self._counter("request_success", "Answers, by why they ended.", "finished_reason")
        self._refused = self._counter("request_refused", "Requests that got no answer, by the status.", "status")
        self._missed = self._counter("deadline_missed", "Answers that were not complete at their deadline.")
        for known in ("stop", "length", "abort", "error"):
            self._success.labels(self._model, known)
        for status in (400, 429, 503, 504):
            self._refused.labels(self._model, str(status))
        for counter in (self._prompt, self._generated, self._reused, self._missed):
            counter.labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self._registry)
        made.labels(self._model)
        return made

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", *labels], registry=self._registry)

    def refused(self, refusal: Refusal) -> None:
        """A request got an error instead of an answer."""
        self._refused.labels(self._model, str(refusal.http_status)).inc()
        if refusal.code == "deadline_exceeded":
            self._missed.labels(self._model).inc()

    def ended(self, answer: Answer, reason: str) -> None:
        """An answer has ended for ``reason``: ``stop``, ``length``, ``tool_calls``, ``abort`` or ``error``."""
        took = time.perf_counter() - answer.came
        self._success.labels(self._model, reason).inc()
        self._prompt.labels(self._model).inc(len(answer.handle.request.prompt))
        self._reused.labels(self._model).inc(answer.cached_tokens)
        self._generated.labels(self._model).inc(len(answer.token_times))
        if answer.is_late:
            self._missed.labels(self._model).inc()
        if answer.token_times:
            self._observe(self._ttft, answer.token_times[0] - answer.came)
            self._observe(self._e2e, answer.token_times[-1] - answer.came)
            self.usual_seconds += _WEIGHT * (took - self.usual_seconds)
        for before, after in pairwise(answer.token_times):
            self._observe(self._itl, after - before)
        if answer.result and answer.token_times:
            prompt, first = answer.prompt_ms / 1000, answer.result.timings.ttft_ms / 1000
            self._observe(self._prefill, prompt)
            self._observe(self._queue, max(answer.begun - answer.came + first - prompt, 0.0))

    def _observe(self, histogram: Histogram, seconds: float) -> None:
        histogram.labels(self._model).observe(seconds)

    def page(self, now: Moment) -> bytes:
        """Everything, as Prometheus reads it (text format 0.0.4)."""
        share = now.pool_bytes_promised / now.pool_bytes if now.pool_bytes else 0.0
        self._set("num_requests_running", "Requests that have rows.", now.running)
        self._set("num_requests_waiting", "Requests that wait to be admitted.", now.waiting)
        self._set("num_requests_taken", "Requests that were taken and have not ended.", now.on_their_way)
        self._set("num_connections", "Open connections.", now.connections)
        self._set("kv_cache_usage_perc", "Share of the row pool that is promised, 0 to 1.", share)
        self._set("kv_pool_bytes", "Bytes of the row pool.", now.pool_bytes)
        self._set("kv_pool_promised_bytes", "Bytes of the row pool that are promised.", now.pool_bytes_promised)
        self._set("kv_pool_used_bytes", "Bytes of rows.", now.pool_bytes_in_use)
        self._set("kv_pool_headroom_bytes", "Not promised yet.", now.pool_bytes - now.pool_bytes_promised)
        for tier in ("text", "core", "secondary"):
            self._set("kv_tier_bytes", "Bytes of rows, by tier.", now.tier_bytes.get(tier, 0), tier=tier)
        self._set("held_pictures", "Conversations' pictures whose rows are kept.", now.held_pictures)
        self._set("held_picture_bytes", "What their rows take.", now.held_picture_bytes)
        self._set("sent_picture_bytes", "Of pictures kept as they were sent.", now.sent_picture_bytes)
        for entry, nbytes in now.memory.items():
            self._set("memory_bytes", "What the process holds, by kind.", nbytes, entry=entry)
        if now.memory_limit is not None:
            left = now.memory_limit - sum(now.memory.values())
            self._set("memory_limit_bytes", "What the process may hold.", now.memory_limit)
            self._set("memory_headroom_bytes", "What the process may hold yet.", left)
        if now.available_bytes is not None:
            self._set("machine_available_bytes", "Memory of the machine that is available.", now.available_bytes)
        if now.stall_percent is not None:
            self._set("machine_memory_stall_perc", "Of ten seconds, waiting for memory, 0 to 100.", now.stall_percent)
        if now.power_mode is not None:
            self._set("power_mode", "1 for the power mode in force.", 1, mode=now.power_mode)
        self._set("ready", "1 while requests are taken.", int(now.is_ready))
        return generate_latest(self._registry)

    def _set(self, name: str, text: str, value: float, **labels: str) -> None:
        if name not in self._gauges:
            named = ["model_name", *labels]
            self._gauges[name] = Gauge(PREFIX + name, text, named, registry=self._registry)
        gauge = self._gauges[name]
        if "mode" in labels:
            gauge.clear()
        gauge.labels(model_name=self._model, **labels).set(value)
