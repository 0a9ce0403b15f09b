"""The engine: one thread that owns the backend, the pool and the scheduler, and whatever is asked of it from others."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

from ..config import require
from ..errors import EngineClosed
from ..model.prompt import Detokenizer, SchemaMatcher
from ..model.sampling import Sampler
from ..model.stop_strings import TextStream
from .engine_loop import EngineLoop
from .handle import Handle
from .requests import Request, Running

T = TypeVar("T")


class Engine:
    """Serves requests on a thread of its own, the only one that computes: torch keeps a team of threads for each thread
    that calls it.

    The thread begins with the first call that needs it. It is a daemon, so that it holds up nobody's exit, and the
    interpreter closes the engine before it shuts down; an engine that nobody has any more ends too. A forked process
    has no such thread: load a runtime there.

    Not ``threaded``, everything runs in the thread of the one caller there may be, while it waits: for tests, which
    :meth:`run_once` steps by hand.
    """

    def __init__(
        self,
        loop: EngineLoop,
        detokenizer: Callable[[], Detokenizer],
        matcher: Callable[[str], SchemaMatcher],
        *,
        threaded: bool = True,
    ) -> None:
        """``detokenizer`` makes one for an answer, ``matcher`` one for an answer by a JSON schema."""
        self.threaded = threaded
        self._loop, self._detokenizer, self._matcher = loop, detokenizer, matcher
        self._thread: threading.Thread | None = None
        self._is_closed = False
        # Held for as long as a message takes to post, and by no finalizer of ours: what is posted under it is heard.
        # Somebody else's may close the engine, also in the middle of a post of the same thread.
        self._gate = threading.RLock()
        weakref.finalize(self, loop.mailbox.post, partial(loop.end, drain=False)).atexit = False

    def submit(self, request: Request, *, priority: int = 0, deadline: float | None = None) -> Handle:
        """Queue a prepared request. Requests of a higher ``priority`` are served before those of a lower one that came
        lately. After ``deadline`` seconds from now it ends with :class:`DeadlineExceeded` if it is not complete.

        Raises :class:`TooLarge` when even an empty pool could not hold it, or the memory for prompts not run it,
        :class:`BadInput` for a JSON schema that cannot be obeyed, and :class:`EngineClosed`.
        """
        require(isinstance(priority, int), f"a priority is a whole number, not {priority!r}")
        require(
            deadline is None or (isinstance(deadline, int | float) and deadline > 0),
            f"a deadline is a number of seconds from now, above 0, not {deadline!r}",
        )
        self._require_open()
        self._loop.scheduler.require_room(request)
        options, prompt = request.options, request.prompt
        matcher = None if options.json_schema is None else self._matcher(options.json_schema)
        text_stream = TextStream(self._detokenizer(), options.stop_strings)
        # The handle keeps its request for as long as somebody looks at the answer, and pixels no longer than needed.
        queued = replace(request, prompt=replace(prompt, pixel_values=None))
        sequence = Running(
            queued, Sampler(options, prompt.token_ids, matcher), text_stream, priority, pixels=prompt.pixel_values
        )
        if deadline is not None:
            sequence.due = sequence.submitted + deadline
        handle = Handle(self, sequence)
        self._post(partial(self._loop.add, sequence))
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request; returns at once."""
        handle.cancel()

    def cancel_sequence(self, sequence: Running) -> None:
        """For handles: takes no lock, and never waits."""
        if not self._loop.has_ended:
            self._loop.mailbox.post(partial(self._loop.cancel, sequence))

    def post(self, message: Callable[[], None]) -> None:
        """Have the engine's thread call ``message`` between two layers or steps, where it still runs. Takes no lock."""
        self._loop.mailbox.post(message)

    def call(self, function: Callable[[], T]) -> T:
        """What ``function`` gives or raises, called by the engine's thread between two layers or steps: whatever it
        looks at is at rest. Raises :class:`EngineClosed`."""
        if threading.current_thread() is self._thread:
            return function()
        if not self.threaded:
            self._require_open()
            self.hear()
            return function()
        call = _Call(function)
        self._post(call.answer)
        return call.outcome()

    def _post(self, message: Callable[[], None]) -> None:
        with self._gate:
            self._require_open()
            if self.threaded and self._thread is None:
                self._thread = threading.Thread(target=_serve, args=(self._loop,), name="avl-edge engine", daemon=True)
                self._thread.start()
            self._loop.mailbox.post(message)
        if not self.threaded:
            self.hear()

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineClosed("the runtime is closed: load another one")
        if self._thread is not None and not self._thread.is_alive():
            raise EngineClosed("the engine's thread is not in this process: load a runtime after the fork")

    @property
    def has_started(self) -> bool:
        """Whether anything was asked of it yet."""
        return self._thread is not None or not self.threaded

    def close(self, *, drain: bool = False) -> None:
        """Take no more requests, cancel those on their way (or, with ``drain``, wait for their ends), free the rows,
        the weights and everything else, and end the thread. Closing twice is safe."""
        with self._gate:
            self._is_closed = True
            self._loop.mailbox.post(partial(self._loop.end, drain=drain))
        if self._thread is None:
            while not self._loop.has_ended:
                self._loop.run_once(interruptible=True)
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def run_once(self) -> bool:
        """One turn of the loop of an engine that is not threaded: a layer of a prompt, or a token for everybody. False
        if there was nothing to do."""
        require(not self.threaded, "the engine runs on a thread of its own: nobody else may step it")
        return self._loop.run_once(interruptible=True)

    def drive(self) -> None:
        """For whoever waits: what was asked, else a turn."""
        if self._loop.mailbox.has_mail:
            self.hear()
        elif not self.run_once():
            raise RuntimeError("nothing is left to run, and an answer is still waited for")

    def hear(self) -> None:
        """Not threaded: let what was posted happen now."""
        if not self.threaded:
            self._loop.hear(interruptible=True)


class _Call(Generic[T]):
    """A function that the engine's thread calls for another one."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._outcomes: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()
        self._is_over = False

    def answer(self) -> None:
        """The engine's thread, once; again where an interrupt came before there was an outcome."""
        if not self._is_over:
            try:
                self._outcomes.put((self._function(), None))
            except BaseException as error:
                self._outcomes.put((None, error))
            self._is_over = True

    def outcome(self) -> T:
        """What the function gave, or raises what it raised. Waits."""
        try:
            value, error = self._outcomes.get()
            if error is not None:
                raise error
            return value  # type: ignore[return-value]
        finally:
            self._is_over = True  # who waited has gone, if it has not begun
            error = None  # its trace has this frame


def _serve(loop: EngineLoop) -> None:
    """The thread, which has the loop alone: an engine that nobody has any more is not kept by its own thread."""
    shut_down = partial(_shut_down, loop, threading.current_thread())
    atexit.register(shut_down)
    while not loop.has_ended:
        with suppress(BaseException):  # an interrupt between two turns, which is outside of what a turn catches
            loop.run()
    atexit.unregister(shut_down)


def _shut_down(loop: EngineLoop, thread: threading.Thread) -> None:
    """Before the interpreter does: a thread that it stops in the middle of torch may crash the process."""
    loop.mailbox.post(partial(loop.end, drain=False))
    thread.join()
