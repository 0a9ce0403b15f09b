"""What its users have of it: a model that answers, from its files to its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType

from ..config import Options, Progress, checked_options, require, size_in_bytes
from ..errors import EngineClosed
from ..machine import allocator
from ..machine.ledger import MemoryStats
from ..machine.pressure import POLL_MS, Limits, Monitor
from ..machine.profile import DeviceProfile
from ..model.images import Source, check_shown
from ..model.prompt import Message, check_messages
from ..model.weight_format import WeightFormats
from ..planning.device_watcher import DeviceWatcher, PlanObjectives
from ..planning.memory_planner import MemoryPlanner
from ..planning.request_planner import DEFAULT_STREAMS, RequestPlanner
from .debug import RuntimeView
from .engine import Engine
from .engine_loop import EngineLoop
from .generation import Generation
from .image_session import ImageSession
from .model_files import ModelFiles
from .picture_reader import PictureReader
from .preparer import Preparer
from .requests import Request
from .schedule_policy import FirstComeFirstServed, SchedulePolicy
from .scheduler import SESSION_CLOSED


class Runtime:
    """A model with its row pool, answering any number of requests together.

    ``Runtime.load("demo")`` is ready to :meth:`generate`. :meth:`open` reads only the small files: :meth:`prepare` can
    check and plan (or refuse) a request before :meth:`load_weights` does any work.
    Any thread may ask; an :class:`~avl_edge.serving.engine.Engine` computes on one of its own. :meth:`close`, or
    leaving it as a context manager, ends that.
    """

    def __init__(
        self,
        files: ModelFiles,
        *,
        threaded: bool = True,
        schedule: SchedulePolicy | None = None,
        max_memory: int | None = None,
    ) -> None:
        self.name, target, spec, processor = files.name, files.target, files.spec, files.processor
        self.spec = spec
        self.kv_shape = spec.text.kv_shape(target.dtype.itemsize)
        self._target = target
        self.planner = RequestPlanner(target, spec, self.kv_shape)
        self._processor = processor
        steps = spec.text.layers if target.runs_prompts_whole else 1
        schedule = schedule or FirstComeFirstServed(steps)
        self._memory = MemoryPlanner(self.planner, max_memory)
        ledger = self._memory.ledger
        self._loop = EngineLoop(self.name, self.kv_shape, processor.eos_token_ids, schedule, ledger)
        self.read_pictures = PictureReader(ledger)
        self._prepare = Preparer(processor, self.planner, self._memory, self.read_pictures)
        self.engine = Engine(self._loop, processor.detokenizer, processor.schema_matcher, threaded=threaded)
        self._watcher: DeviceWatcher | None = None

    @property
    def debug(self) -> RuntimeView:
        """The parts of the runtime as they are now, for tests, traces and tools."""
        return RuntimeView.of(self.engine, self._loop, self._watcher)

    @property
    def home(self) -> object:
        """What the requests about this runtime's image sessions name it by; it does not keep the runtime."""
        return self._loop

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] = "demo",
        *,
        device: str | None = None,
        threaded: bool = True,
        schedule: SchedulePolicy | None = None,
        max_memory: int | str | None = None,
        weights: str | None = None,
        head: str | None = None,
    ) -> Runtime:
        """Read and check the small files of ``model``: "demo", or the directory of a checkpoint (:class:`BadModel`) or
        of a built package. ``device``: one of :data:`~avl_edge.backends.targets.TARGETS`, which raises what is wrong
        with it; None takes tensorrt for a package, and the cpu for others.

        ``schedule`` says who is served when; None: first come, first served. Not ``threaded``, the model runs in the
        one thread that asks, while it waits: for tests. ``max_memory`` (bytes, or a size like "12GB") bounds the whole
        process: what it holds already, the weights, the pool and whatever requests take beside their rows
        (:meth:`memory`); :class:`TooLarge`, naming the least that would do, where not even the model fits. ``weights``
        and ``head``: what the decoder's matrices and its head are packed in as they are loaded, "int8", "int4" or
        "int4:GROUP" (:class:`BadInput` where that does not fit); None: they stay as they are stored.
        """
        most = None if max_memory is None else size_in_bytes("max_memory", max_memory)
        if most is not None:
            allocator.bound()
        files = ModelFiles.read(model, device, WeightFormats.of(weights, head))
        return cls(files, threaded=threaded, schedule=schedule, max_memory=most)

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
        threaded: bool = True,
        schedule: SchedulePolicy | None = None,
        max_memory: int | str | None = None,
        threads: int | None = None,
        weights: str | None = None,
        head: str | None = None,
    ) -> Runtime:
        """:meth:`open` and :meth:`load_weights`, with :meth:`keep_free` for ``reserve_bytes`` and :meth:`follow` for a
        ``profile`` or the device; ``device_root`` is where both look at the machine."""
        runtime = cls.open(
            model,
            device=device,
            threaded=threaded,
            schedule=schedule,
            max_memory=max_memory,
            weights=weights,
            head=head,
        )
        profiles = (profile,) if isinstance(profile, DeviceProfile) else profile
        if reserve_bytes is not None:
            runtime.keep_free(reserve_bytes, root=device_root)
        if profiles or follow_device:
            target = target_ms_per_token
            runtime.follow(profiles, follow_device=follow_device, target_ms_per_token=target, root=device_root)
        runtime.load_weights(pool_bytes=pool_bytes, progress=progress, threads=threads)
        return runtime

    def load_weights(
        self, *, pool_bytes: int | None = None, progress: Progress | None = None, threads: int | None = None
    ) -> None:
        """Map and read the weights and reserve the pool, once, for all requests.

        ``pool_bytes`` is its size; None takes four full contexts, 4 GiB at most, and where the memory of the process is
        bounded what the longest prompt leaves. ``threads`` are those of a decode step on a processor; None takes as
        many as torch uses, which are the cores that this process may use, or fewer. Raises :class:`TooLarge` for a pool
        beyond that bound.
        """
        require(threads is None or threads >= 1, f"threads must be 1 or more, not {threads}")
        self._target.threads = threads
        interrupted = threading.Event()

        def report(done: int, total: int) -> None:
            if interrupted.is_set():
                raise EngineClosed("loading was interrupted")
            if progress:
                progress(done, total)

        try:
            self.engine.call(lambda: self._load(pool_bytes, report))
        except BaseException:
            interrupted.set()
            raise

    def _load(self, pool_bytes: int | None, progress: Progress) -> None:
        require(self._loop.backend is None, "the weights are loaded already: open another Runtime for another pool")
        allocator.bound()
        pages = self._memory.pool_pages(pool_bytes)
        weight_bytes, recorded = self._target.weight_bytes(self.planner.model), self._loop.ledger["recorded_steps"]
        self._loop.load(
            lambda: self._target.load(self.spec, self.kv_shape, pages, progress, recorded), pages, weight_bytes
        )

    @property
    def load_ms(self) -> float:
        """How long the weights took to load, milliseconds."""
        return self._loop.load_ms

    @property
    def can_keep_free(self) -> bool:
        """Whether :meth:`keep_free` is served where the model runs."""
        return self._target.cannot_give_back is None

    def keep_free(
        self,
        reserve_bytes: int,
        *,
        root: str | os.PathLike[str] = "/",
        every_ms: float = POLL_MS,
        most_wait_s: float = Limits.most_wait_s,
    ) -> None:
        """From now on leave ``reserve_bytes`` to other processes: when memory is short, requests that run are stored
        smaller, then give rows up, then new ones wait (``kv.pressure`` in a result), ``most_wait_s`` seconds at most:
        then they end with :class:`Busy`. ``root``: the machine's files, read between two steps, at most every
        ``every_ms`` (0: each time). :class:`BadInput` for what the machine can never leave beside this process."""
        require(self.can_keep_free, self._target.cannot_give_back or "")
        own = 0 if self._loop.backend else self._target.weight_bytes(self.planner.model)
        limits = Limits(reserve_bytes, most_wait_s=most_wait_s)
        self._loop.monitor = Monitor(limits, os.fspath(root), every_ms, own_bytes=own + allocator.resident_bytes())

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
        model = replace(self.planner.model, name=self.name)
        objectives = PlanObjectives(streams, target_ms_per_token)
        self._watcher = DeviceWatcher(
            model, objectives, profiles, follows=follow_device, root=os.fspath(root), every_ms=every_ms
        )

    def prepare(
        self, images: Sequence[Source], prompt: str, options: Options | None = None, before: Sequence[Message] = ()
    ) -> Request:
        """:meth:`prepare_chat` of a question about ``images``, and what was said ``before`` (system, earlier turns)."""
        check_shown(images)
        check_messages(before)
        return self.prepare_chat([*before, Message("user", [*images, prompt])], options)

    def prepare_chat(self, messages: Sequence[Message], options: Options | None = None) -> Request:
        """Check a conversation, of which the answer to the last message is wanted, and plan its memory, holding
        nothing.

        Raises :class:`BadInput` for what cannot be answered, :class:`TooLarge` for what exceeds the model's context,
        its budget, or the memory of the process, and :class:`Busy` while the pixels of others take that for its own.
        """
        state = self._watcher.state() if self._watcher else None
        return self._prepare(messages, options, self._loop.pool.pages, state)

    @property
    def max_pixels(self) -> int:
        """The most that a picture may have, by what a bounded memory of the process leaves for decoding one."""
        return self.read_pictures.max_pixels

    def kv_bytes_left(self, prompt_bytes: int) -> int | None:
        """What a bounded memory of the process leaves for rows beside what a prompt takes, or None."""
        return self._memory.kv_bytes_left(prompt_bytes, self._loop.pool.pages)

    def require_memory(self, prompt_bytes: int, kv_bytes: int, what: str) -> None:
        """Raise :class:`TooLarge`, naming the least ``max_memory`` that would hold ``kv_bytes`` beside a prompt."""
        self._memory.require(prompt_bytes, kv_bytes, self._loop.pool.pages, what)

    def memory(self) -> MemoryStats:
        """What the process holds now, by kind: of activations what requests were planned to take."""
        return self._loop.ledger.stats

    def submit(self, request: Request, *, priority: int = 0, deadline: float | None = None) -> Generation:
        """Queue a prepared request; ``priority`` and ``deadline`` as
        :meth:`~avl_edge.serving.engine.Engine.submit` says. Loads the weights if nobody did.

        Raises :class:`TooLarge` when even an empty pool could not hold it, :class:`BadInput` for a question about an
        image session that was closed, or is another runtime's, and :class:`EngineClosed`.
        """
        prefix = request.prefix
        home = prefix.home if prefix else self.home
        require(home is self.home, "the question is about an image session of another runtime: submit it there")
        require(not (prefix and prefix.is_closed), SESSION_CLOSED)
        if self._loop.backend is None:
            self.engine.call(self._load_if_nobody_did)
        return Generation(self.engine.submit(request, priority=priority, deadline=deadline))

    def _load_if_nobody_did(self) -> None:
        if self._loop.backend is None:
            self._load(None, lambda *_: None)

    def generate(
        self, images: Sequence[Source], prompt: str, options: Options | None = None, before: Sequence[Message] = ()
    ) -> Generation:
        """Ask about ``images`` (paths, bytes, streams, arrays, Pillow images, :class:`Frames`): an iterator of
        :class:`TokenEvent`. Those that are open together are decoded together. ``before``: as :meth:`prepare`."""
        return self.submit(self.prepare(images, prompt, options, before))

    def open_images(
        self, images: Sequence[Source], options: Options | None = None, before: Sequence[Message] = ()
    ) -> ImageSession:
        """An image session of ``images`` and what was said and shown ``before``, about which any number of questions
        may be asked, at once or one after another; they share its rows. See
        :class:`~avl_edge.serving.image_session.ImageSession` for what ``options`` say.

        Checks and plans, and raises, as :meth:`prepare` does: the pictures are encoded with the first question.
        """
        check_shown(images)
        return self.open_chat([*before, Message("user", images)], options)

    def open_chat(
        self, messages: Sequence[Message], options: Options | None = None, *, spare: bool = False
    ) -> ImageSession:
        """As :meth:`open_images`, of messages that end with pictures. A ``spare`` one may be closed between two
        questions, where others need its rows."""
        check_messages(messages)
        return ImageSession.of(self, self._processor, self.planner, messages, checked_options(options), spare=spare)

    def token_text(self, token_id: int) -> str:
        """A single token as it reads in an answer."""
        return self._processor.text.token_text(token_id)

    def free_image_sessions(self, *, wait: bool = True) -> None:
        """Free the rows of closed image sessions without a question on its way; a finalizer may not ``wait``."""
        if not wait:
            self.engine.post(self._loop.free_image_sessions)
        elif self.engine.has_started:
            with suppress(EngineClosed):  # which freed everything
                self.engine.call(self._loop.free_image_sessions)

    @property
    def kv_bytes_in_use(self) -> int:
        """Bytes of all rows that requests hold now, each in its format. Waits for the layer or step that is running."""
        if not self.engine.has_started:
            return 0
        try:
            return self.engine.call(lambda: self._loop.pool.bytes_in_use)
        except EngineClosed:
            return 0

    def close(self, *, drain: bool = False) -> None:
        """Take no more requests, cancel or ``drain`` those on their way, free everything. Twice is safe."""
        self.engine.close(drain=drain)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
