"""What the engine's thread does: hear what is asked, decide, compute, hand out tokens. No other thread touches it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

from ..backends.base import Backend
from ..config import KvShape
from ..errors import Busy, DeadlineExceeded
from ..kv.pool import RowPool
from ..machine.ledger import EntryName, Ledger
from ..machine.pressure import Monitor
from ..model.features import FeatureCache
from ..request import Result
from .failure import Failure
from .mailbox import Mailbox
from .memory_pressure import MemoryPressureHandler
from .model_runner import ModelRunner
from .outcome import result_of
from .requests import Running
from .schedule_policy import Advance, Decode, SchedulePolicy
from .scheduler import NO_ROOM, Scheduler

_log = logging.getLogger("avl_edge")

_LOADED: tuple[EntryName, ...] = ("weights", "kv_pool", "activations", "features", "recorded_steps")
"""What is held from loading to the end."""
_HELD_SECONDS = 0.02
"""How long to wait before memory is looked at again, while it is all that requests wait for."""


class EngineLoop:
    """The backend, the pool, the scheduler, and the loop over them.

    Everything here is called on one thread; others post to ``mailbox``. ``name`` of the model, ``ends`` its end tokens;
    ``ledger``: under which is counted what all of it holds.
    """

    def __init__(
        self, name: str, shape: KvShape, ends: Collection[int], policy: SchedulePolicy, ledger: Ledger
    ) -> None:
        self.ledger = ledger
        self.mailbox = Mailbox()
        self.monitor: Monitor | None = None
        self.load_ms = 0.0
        self.has_ended = False
        self._name, self._shape, self._ends, self._policy = name, shape, frozenset(ends), policy
        self._at_work: tuple[Running, ...] = ()
        self._drains = False
        self.backend: Backend | None = None
        self._reset(0)

    def _reset(self, pages: int) -> None:
        for name in _LOADED:
            self.ledger[name].clear()
        self.pool = RowPool(pages, self._shape)
        self.scheduler = Scheduler(self.pool, self._shape.layers, self._policy, self.ledger["activations"])
        self.features: FeatureCache | None = None
        self._runner: ModelRunner | None = None

    def load(self, make: Callable[[], Backend], pages: int, weight_bytes: int) -> None:
        """Make the backend, whose weights take so many bytes, and a pool of ``pages`` for its rows."""
        start = time.perf_counter()
        self._reset(pages)
        self.ledger["weights"].hold("weights", weight_bytes, "the model")
        self.ledger["kv_pool"].hold("pool", pages * self.pool.page_bytes, "the pool")
        backend = make()
        self.use(backend)
        self.load_ms = 1000 * (time.perf_counter() - start)

    def use(self, backend: Backend) -> None:
        """Compute by ``backend`` from the next step on, over the same rows; pictures are encoded anew."""
        self.features = FeatureCache(self.ledger["features"])
        self.features.forget()
        self._runner = ModelRunner(backend, self.features, self.scheduler)
        self.backend = backend

    def run(self) -> None:
        """The thread: until it was told to :meth:`end`."""
        interrupt: BaseException | None = None
        while not self.has_ended:
            try:
                if interrupt:
                    _log.error("avl-edge: the engine's loop was interrupted, and goes on", exc_info=interrupt)
                    interrupt = None
                if not self.run_once() and not self.has_ended:
                    self.mailbox.wait()
            except BaseException as error:
                interrupt = error

    def run_once(self, *, interruptible: bool = False) -> bool:
        """Hear what was asked, then run one layer of a prompt, or one token for everybody; False if there is nothing to
        do. Where requests wait for nothing but memory, a moment passes.

        What fails ends those whose computation it was, each with an error for its own caller; where it was nobody's,
        everybody. With ``interruptible`` an interrupt (no :class:`Exception`) cancels those it fell on, and goes on.
        """
        return self._guarded(self._whole_turn, interruptible)

    def hear(self, *, interruptible: bool = False) -> None:
        """Hear what was asked, and compute nothing."""
        self._guarded(self._only_hear, interruptible)

    def _guarded(self, work: Callable[[], bool], interruptible: bool) -> bool:
        if self._at_work:  # the last recovery was cut short: of nobody is it certain what he holds
            self._at_work = tuple(dict.fromkeys((*self._at_work, *self.scheduler.requests)))
            self._recover(RuntimeError("the step was interrupted"))
        try:
            return work()
        except BaseException as error:
            interrupt = interruptible and not isinstance(error, Exception)
            self._recover(None if interrupt else error)
            if interrupt:
                raise
        return True

    def _whole_turn(self) -> bool:
        self.mailbox.hear()
        waited = len(self.scheduler.requests)
        self._expire()
        expired = len(self.scheduler.requests) < waited
        self._check_memory()
        return self._turn() or expired

    def _only_hear(self) -> bool:
        self.mailbox.hear()
        return True

    def _turn(self) -> bool:
        choice = self.scheduler.next(time.perf_counter())
        if isinstance(choice, Advance):
            self._advance(choice)
        elif isinstance(choice, Decode):
            self._decode(choice.sequences)
        elif stuck := self.scheduler.stuck:
            self.finish(stuck, "error", Busy(NO_ROOM))
        elif self.scheduler.waiting:
            self.mailbox.wait(_HELD_SECONDS)
        elif self._drains:
            self._end()
        else:
            return False
        return True

    def _advance(self, choice: Advance) -> None:
        sequence = choice.sequence
        self._at_work = (sequence,)
        assert self._runner is not None, "nothing runs before the weights are loaded"
        task = sequence.prompt_task = sequence.prompt_task or self._runner.prompt(sequence)
        try:
            for _ in range(choice.layers):
                next(task)
        except StopIteration as end:
            logits = end.value
        else:
            self._at_work = ()
            return
        if logits is None:
            self.finish(sequence, "stop")
        else:
            self.scheduler.start(sequence)
            self._push(sequence, sequence.sampler(logits))
        self._at_work = ()

    def _decode(self, sequences: Sequence[Running]) -> None:
        self._at_work = tuple(sequences)
        assert self._runner is not None, "nothing runs before the weights are loaded"
        result = self._runner.decode(sequences)
        broken: list[tuple[Running, Exception]] = []
        for number, sequence in enumerate(sequences):
            try:
                if error := result.failures.get(number):
                    broken.append((sequence, error))
                else:
                    token = result.tokens[number] if result.logits is None else sequence.sampler(result.logits[number])
                    self._push(sequence, token)
            except Exception as error:
                broken.append((sequence, error))
        if broken:
            self._break_off([sequence for sequence, _ in broken], [error for _, error in broken])
        self._at_work = ()

    def _push(self, sequence: Running, token: int) -> None:
        if reason := sequence.push(token, self._ends):
            self.finish(sequence, reason)

    def _expire(self) -> None:
        now = time.perf_counter()
        for sequence in self.scheduler.requests:
            if sequence.due is not None and now > sequence.due:
                late = f"the deadline passed after {len(sequence.token_ids)} tokens of the answer"
                self.finish(sequence, "error", DeadlineExceeded(f"{late}: give more time, or ask for less at once"))
        if self.monitor and self.scheduler.is_held:
            self._end_waiting(self.monitor)

    def _end_waiting(self, monitor: Monitor) -> None:
        for sequence in self.scheduler.waiting:
            if self.scheduler.waited_ms(sequence) > 1000 * monitor.most_wait_s:
                short = f"memory stayed short for {monitor.most_wait_s:g} s ({monitor.describe()})"
                cure = "end other programs, lower the reserve (--reserve) or ask again later"
                self.finish(sequence, "error", Busy(f"{short}: {cure}"))

    def _check_memory(self) -> None:
        """Give memory back where it is short. A request that an error catches in the middle of it ends with it."""
        if self.monitor is None:
            return
        rows = self.backend.rows if self.backend else None
        handler = MemoryPressureHandler(self.monitor, self.pool, rows, self.scheduler, self.features)
        handler.check(self._caught)

    def _caught(self, sequence: Running, error: BaseException) -> None:
        self._at_work = (sequence,)
        if isinstance(error, Exception):
            self._break_off([sequence], [error])
            self._at_work = ()

    def finish(self, sequence: Running, reason: str, error: BaseException | None = None) -> None:
        """End a request for ``reason``: its result is fixed, its rows are free, its events end. Twice is safe."""
        self._at_work = (*self._at_work, sequence)
        self._conclude(sequence, reason, error)
        self.scheduler.remove(sequence)
        sequence.events.end()
        self._at_work = tuple(each for each in self._at_work if each is not sequence)

    def _conclude(self, sequence: Running, reason: str, error: BaseException | None, *, broken: bool = False) -> None:
        if sequence.result is None:
            sequence.failure = Failure(error) if error else None
            sequence.result = self._result(sequence, reason, broken=broken)

    def _break_off(self, sequences: Sequence[Running], errors: Sequence[BaseException | None]) -> None:
        """End requests whose computation broke off anywhere, with an error each or, for None, as cancelled; the pool's
        books are made anew."""
        try:
            for sequence, error in zip(sequences, errors, strict=True):
                self._conclude(sequence, "error" if error else "cancelled", error, broken=True)
        finally:
            self.scheduler.drop(sequences)
        for sequence in sequences:
            sequence.events.end()

    def _recover(self, error: BaseException | None) -> None:
        """After what came out of a turn; None: an interrupt, which is its own caller's."""
        if error and not self._at_work:
            _log.error("avl-edge: the engine's loop failed, and ends all requests", exc_info=error)
            self._at_work = self.scheduler.requests
        self._break_off(self._at_work, [error] * len(self._at_work))
        self._at_work = ()

    def cancel(self, sequence: Running) -> None:
        """End a request, wherever it stands."""
        self.finish(sequence, "cancelled")

    def add(self, sequence: Running) -> None:
        """Queue a request; what speaks against it is its own caller's to hear."""
        try:
            if sequence.result is None:
                self.scheduler.add(sequence)
        except Exception as error:
            self.finish(sequence, "error", error)

    def free_image_sessions(self) -> None:
        """Free the rows of closed image sessions about which no question is on its way."""
        self.scheduler.free_image_sessions()

    def end(self, *, drain: bool) -> None:
        """Take the loop to its end: at once, with every request cancelled, or once they have ended."""
        if drain:
            self._drains = True
        else:
            self._end()

    def _end(self) -> None:
        try:
            self._at_work = self.scheduler.requests
            self._recover(None)
        finally:
            self.backend, self.monitor = None, None
            self._reset(0)
            self.has_ended = True

    def _result(self, sequence: Running, reason: str, *, broken: bool) -> Result:
        make = partial(
            result_of,
            sequence,
            reason=reason,
            model=self._name,
            backend=self.backend.name if self.backend else "",
            shape=self._shape,
            load_ms=self.load_ms,
            waited_ms=self.scheduler.waited_ms(sequence),
        )
        try:
            return make(sequence.cache)
        except Exception:
            if not broken:
                raise
            return make(None)  # what it holds was left in the middle of a change
