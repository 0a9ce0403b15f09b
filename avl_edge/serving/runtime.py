"""The loop: schedule, forward, sample, emit."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ..backends.base import Backend
from ..backends.target import Target
from ..backends.targets import open_target
from ..config import Options, Progress, checked_options, require
from ..errors import BadInput, BadModel, DoesNotFit
from ..kv.cache import prompt_shape
from ..kv.pool import RowPool
from ..machine import allocator
from ..machine.pressure import POLL_MS, Limits, Monitor
from ..machine.profile import DeviceProfile
from ..model.demo import DEMO
from ..model.features import FeatureCache
from ..model.prompt import ImageSource, Processor, check_sources
from ..model.sampling import Sampler
from ..model.sizes import shape_of_checkpoint
from ..model.spec import ModelSpec, read_spec
from ..model.stop_strings import TextStream
from ..planning.device_watcher import DeviceWatcher, PlanObjectives
from ..planning.request_planner import DEFAULT_STREAMS, RequestPlanner
from ..request import Result
from .debug import RuntimeView
from .generation import Generation
from .image_session import ImageSession
from .memory_pressure import MemoryPressureHandler
from .model_runner import ModelRunner
from .outcome import result_of
from .scheduler import NO_ROOM, Request, Running, Scheduler, Work

_WAIT_SECONDS = 0.02


class Runtime:
    """A model with its row pool, answering any number of requests together.

    ``Runtime.load("demo")`` is ready to :meth:`generate`. :meth:`open` reads only the small files, so that
    :meth:`prepare` can check and plan (or refuse) a request before :meth:`load_weights` does any work.
    One lock guards the loop: several threads may iterate their generations.
    """

    def __init__(self, name: str, target: Target, spec: ModelSpec, processor: Processor) -> None:
        self.name = name
        self.spec = spec
        self.kv_shape = spec.text.kv_shape(target.dtype.itemsize)
        self.load_ms = 0.0
        self._target = target
        self.planner = RequestPlanner(target, spec, self.kv_shape)
        self._processor = processor
        self._lock = threading.RLock()
        self._stepping = False
        self._abandoned: deque[Running] = deque()
        self._pool = RowPool(0, self.kv_shape)
        self._backend: Backend | None = None
        self._scheduler = Scheduler(self._pool, self.kv_shape.layers)
        self._features: FeatureCache | None = None
        self._monitor: Monitor | None = None
        self._watcher: DeviceWatcher | None = None

    @property
    def debug(self) -> RuntimeView:
        """The parts of the runtime as they are now, for tests, traces and tools."""
        return RuntimeView(
            backend=self._backend,
            scheduler=self._scheduler,
            pool=self._pool,
            rows=self._backend.rows if self._backend else None,
            features=self._features,
            monitor=self._monitor,
            device_watcher=self._watcher,
            replace_backend=self._replace_backend,
        )

    def _replace_backend(self, backend: Backend) -> None:
        with self._lock:
            self._use(backend)

    def _use(self, backend: Backend) -> None:
        self._backend = backend
        self._features = FeatureCache(lambda pixels: backend.encode_images(pixels))

    @classmethod
    def open(cls, model: str | os.PathLike[str] = "demo", *, device: str | None = None) -> Runtime:
        """Read and check the small files of ``model``: "demo", or the directory of a checkpoint (:class:`BadModel`) or
        of a built package. ``device``: one of :data:`~avl_edge.backends.targets.TARGETS`, which raises what is wrong
        with it; None takes tensorrt for a package, and the cpu for others."""
        given = DEMO if model == "demo" else Path(model)
        if not os.fspath(model) or not given.is_dir():
            raise BadModel(f"there is no model {os.fspath(model)!r}: give 'demo' or the directory of a checkpoint")
        target = open_target(given, device)
        spec = read_spec(target.directory)
        target.check_model(spec)
        name = "demo" if model == "demo" else given.resolve().name
        return cls(name, target, spec, Processor.of(spec, target.directory))

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] = "demo",
        *,
        device: str | None = None,
        pool_bytes: int | None = None,
        progress: Progress | None = None,
        reserve_bytes: int | None = None,
        profile: DeviceProfile | Sequence[DeviceProfile] = (),
        follow_device: bool = False,
        target_ms_per_token: float | None = None,
        device_root: str | os.PathLike[str] = "/",
    ) -> Runtime:
        """:meth:`open` and :meth:`load_weights`, with :meth:`keep_free` for ``reserve_bytes`` and :meth:`follow` for a
        ``profile`` or the device; ``device_root`` is where both look at the machine."""
        runtime = cls.open(model, device=device)
        profiles = (profile,) if isinstance(profile, DeviceProfile) else profile
        if reserve_bytes is not None:
            runtime.keep_free(reserve_bytes, root=device_root)
        if profiles or follow_device:
            runtime.follow(
                profiles, follow_device=follow_device, target_ms_per_token=target_ms_per_token, root=device_root
            )
        runtime.load_weights(pool_bytes=pool_bytes, progress=progress)
        return runtime

    def load_weights(self, *, pool_bytes: int | None = None, progress: Progress | None = None) -> None:
        """Map and read the weights and reserve the pool, once, for all requests.

        ``pool_bytes`` is its size; None takes four full contexts, 4 GiB at most.
        """
        with self._lock:
            if self._backend is not None:
                raise BadInput("the weights are loaded already: open another Runtime for another pool")
            allocator.bound()
            start = time.perf_counter()
            pages = self.planner.pool_pages(pool_bytes)
            backend = self._target.load(self.spec, self.kv_shape, pages, progress)
            self._pool = RowPool(pages, self.kv_shape)
            self._scheduler = Scheduler(self._pool, self.kv_shape.layers)
            self._use(backend)
            self.load_ms = 1000 * (time.perf_counter() - start)

    @property
    def can_keep_free(self) -> bool:
        """Whether :meth:`keep_free` is served where the model runs."""
        return self._target.cannot_give_back is None

    def keep_free(self, reserve_bytes: int, *, root: str | os.PathLike[str] = "/", every_ms: float = POLL_MS) -> None:
        """From now on leave ``reserve_bytes`` to other processes: when memory is short, requests that run are stored
        smaller, then give rows up, then new ones wait (``kv.pressure`` in a result). ``root``: the machine's files,
        read between two steps, at most every ``every_ms`` (0: each time)."""
        require(self.can_keep_free, self._target.cannot_give_back or "")
        self._monitor = Monitor(Limits(reserve_bytes), os.fspath(root), every_ms)

    def follow(
        self,
        profiles: Sequence[DeviceProfile] = (),
        *,
        follow_device: bool = True,
        streams: int = DEFAULT_STREAMS,
        target_ms_per_token: float | None = None,
        root: str | os.PathLike[str] = "/",
        every_ms: float = POLL_MS,
    ) -> None:
        """From now on plan requests by a device's profile: one without a KV budget gets what the profile leaves for
        rows, divided by ``streams``, and settings that keep the target.

        With ``follow_device`` the profile is that of the machine in its present power mode, matched anew for each
        request, at most every ``every_ms``: ``profiles`` (of this machine) before those that are shipped. Without it,
        the first of ``profiles``.
        """
        model = shape_of_checkpoint(self._target.directory, self.name)
        objectives = PlanObjectives(streams, target_ms_per_token)
        self._watcher = DeviceWatcher(
            model, objectives, profiles, follows=follow_device, root=os.fspath(root), every_ms=every_ms
        )

    def prepare(self, images: Sequence[ImageSource], prompt: str, options: Options | None = None) -> Request:
        """Check a request and plan its memory, holding nothing.

        Raises :class:`BadInput` for what cannot be answered and :class:`DoesNotFit` for what exceeds its budget.
        """
        options = checked_options(options)
        check_sources(images)
        token_ids, spans = self._processor.lay_out(len(images), prompt)
        max_new_tokens = self.planner.new_tokens(len(token_ids), options)
        state = self._watcher.state() if self._watcher else None
        pages = self._pool.pages or self.planner.pool_pages(None)
        plan = self.planner.plan(pages, options, prompt_shape(len(token_ids), spans), max_new_tokens - 1, state)
        device = state.stats if state else None
        return Request(self._processor.read(images, token_ids, spans), options, plan, max_new_tokens, device)

    def submit(self, request: Request) -> Generation:
        """Queue a prepared request. Raises :class:`DoesNotFit` when even an empty pool could not hold it, and
        :class:`BadInput` for a question about an image session that was closed, or is another runtime's."""
        home = request.prefix.home if request.prefix else self
        require(home is self, "the question is about an image session of another runtime: submit it there")
        with self._lock:
            if self._backend is None:
                self.load_weights()
        self._scheduler.require_room(request)
        sampler = Sampler(request.options, request.prompt.token_ids)
        sequence = Running(request, sampler, TextStream(self._processor.detokenizer(), request.options.stop_strings))
        with self._lock:
            self._scheduler.add(sequence)
        return Generation(self, sequence)

    def generate(self, images: Sequence[ImageSource], prompt: str, options: Options | None = None) -> Generation:
        """Ask about ``images`` (paths, bytes or Pillow images): an iterator of :class:`TokenEvent`.

        The request is queued at once; requests that are open together are decoded together.
        """
        return self.submit(self.prepare(images, prompt, options))

    def open_images(self, images: Sequence[ImageSource], options: Options | None = None) -> ImageSession:
        """An image session of ``images``, about which any number of questions may be asked, at once or one after
        another; they share its rows. See :class:`~avl_edge.serving.image_session.ImageSession` for what ``options``
        say.

        Checks and plans, as :meth:`prepare` does: the pictures are encoded with the first question.
        """
        return ImageSession.of(self, self._processor, self.planner, images, checked_options(options))

    def free_image_sessions(self) -> None:
        """Free the rows of closed image sessions about which no question is on its way. In the middle of a step, at its
        end."""
        with self._lock:
            if self._stepping:
                return
            try:
                self._scheduler.free_image_sessions()
            except BaseException:
                self._scheduler.drop(())
                raise

    @property
    def kv_bytes_in_use(self) -> int:
        """Bytes of all rows that requests hold now, each in its format."""
        return self._pool.bytes_in_use

    def step(self) -> bool:
        """One prompt, or one token for everybody; False when there is nothing to do. Where nobody runs, and requests
        wait for memory, a moment passes.

        What fails in a step ends the requests of that step, each with its error for its own caller. An interrupt ends
        them too, and goes on. Where nobody runs and open image sessions leave no room for who waits, the first of these
        ends with :class:`DoesNotFit`.
        """
        with self._lock:
            self._end_step()  # again, where an interrupt cut the last one's short
            self._check_memory()
            work = self._scheduler.next()
            stuck = self._scheduler.stuck if work is None else None
            if work:
                self._run(work)
            elif stuck:
                self._break_off(Work((stuck,), prefill=True), DoesNotFit(NO_ROOM))
        if not work and self.is_waiting:
            time.sleep(_WAIT_SECONDS)
            return True
        return work is not None or stuck is not None

    @property
    def is_waiting(self) -> bool:
        """Whether requests wait because memory is short."""
        return self._scheduler.is_held and self._scheduler.waits

    def _check_memory(self) -> None:
        """Give memory back where it is short. A request that an error catches in the middle of it ends with it."""
        if self._monitor is None:
            return
        self._stepping = True
        try:
            rows = self._backend.rows if self._backend else None
            handler = MemoryPressureHandler(self._monitor, self._pool, rows, self._scheduler, self._features)
            handler.check(lambda sequence, error: self._break_off(Work((sequence,), False), error))
        finally:
            self._stepping = False  # before any call, at which an interrupt may fall
            self._end_step()

    def _run(self, work: Work) -> None:
        self._stepping = True
        try:
            assert self._backend is not None, "nothing runs before the weights are loaded"
            assert self._features is not None
            model = ModelRunner(self._backend, self._features, self._scheduler)
            first = work.sequences[0]
            if work.prefill:
                model.prefill_prefix(first.request.prefix)
            if first.request.max_new_tokens == 0:
                return self.finish(first, "stop")
            for sequence, token in zip(work.sequences, model.next_tokens(work), strict=True):
                if reason := sequence.push(token, self._processor.eos_token_ids):
                    self.finish(sequence, reason)
        except BaseException as error:
            self._break_off(work, error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._stepping = False  # before any call, at which an interrupt may fall
            self._end_step()

    def _end_step(self) -> None:
        while self._abandoned:
            self.finish(self._abandoned[0], "cancelled")
            self._abandoned.popleft()
        self.free_image_sessions()

    def _break_off(self, work: Work, error: BaseException) -> None:
        try:
            for sequence in work.sequences:
                if sequence.result is None:
                    sequence.error = error if isinstance(error, Exception) else None
                    sequence.result = self._result(sequence, "error" if sequence.error else "cancelled")
        finally:
            self._scheduler.drop(work.sequences)

    def finish(self, sequence: Running, reason: str) -> None:
        """End a request for ``reason``: its result is fixed, its rows are free. Safe to call twice.

        A generation that the garbage collector drops in the middle of a step ends when the step does.
        """
        with self._lock:
            if self._stepping and reason == "cancelled":
                self._abandoned.append(sequence)
                return
            if sequence.result is None:
                sequence.result = self._result(sequence, reason)
            try:
                self._scheduler.remove(sequence)
            except BaseException:
                self._scheduler.drop((sequence,))
                raise

    def _result(self, sequence: Running, reason: str) -> Result:
        return result_of(
            sequence,
            reason,
            model=self.name,
            backend=self._backend.name if self._backend else "",
            shape=self.kv_shape,
            load_ms=self.load_ms,
            waited_ms=self._scheduler.waited_ms(sequence),
        )
