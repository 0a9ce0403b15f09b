"""The loop: schedule, forward, sample, emit."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from torch import Tensor

from . import allocator, checkpoint
from .backend import Backend, TorchBackend
from .budget import fit
from .cache import SequenceCache, prompt_shape
from .checkpoint import Progress
from .config import KvShape, Options, format_size
from .errors import BadInput, BadModel, DoesNotFit
from .models import Llava
from .policies import candidates
from .pool import RowPool, RowStore
from .prompt import ImageSource, Processor
from .request import KvStats, Prompt, Result, Timings, TokenEvent, Usage
from .sampler import Sampler
from .scheduler import Request, Running, Scheduler, Work
from .spec import ModelSpec, read_spec

DEMO = Path(__file__).parent / "demo"
_DEFAULT_STREAMS = 4
_DEFAULT_POOL_LIMIT = 4 * 2**30


class Runtime:
    """A model with its row pool, answering any number of requests together.

    ``Runtime.load("demo")`` is ready to :meth:`generate`. :meth:`open` reads only the small files, so that
    :meth:`prepare` can check and plan (or refuse) a request before :meth:`load_weights` does any work.
    One lock guards the loop: several threads may iterate their generations.
    """

    def __init__(self, name: str, directory: Path, spec: ModelSpec, processor: Processor, shape: KvShape) -> None:
        self.name = name
        self.spec = spec
        self.kv_shape = shape
        self.load_ms = 0.0
        self._directory = directory
        self._processor = processor
        self._lock = threading.RLock()
        self._stepping = False
        self._abandoned: deque[Running] = deque()
        self._pool = RowPool(0)
        self._backend: Backend | None = None
        self._scheduler = Scheduler(self._pool, shape.layers)

    @classmethod
    def open(cls, model: str | os.PathLike[str] = "demo") -> Runtime:
        """Read and check the small files of ``model``: "demo", or a checkpoint directory (:class:`BadModel`)."""
        directory = DEMO if model == "demo" else Path(model)
        if not os.fspath(model) or not directory.is_dir():
            raise BadModel(f"there is no model {os.fspath(model)!r}: give 'demo' or the directory of a checkpoint")
        spec = read_spec(directory)
        shape = spec.text.kv_shape(checkpoint.stored_dtype(directory).itemsize)
        processor = Processor.open(
            directory,
            image_token_id=spec.image_token_id,
            tokens_per_image=spec.tokens_per_image,
            vocab_size=spec.text.vocab_size,
            image_size=spec.vision.image_size,
        )
        return cls("demo" if model == "demo" else directory.resolve().name, directory, spec, processor, shape)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] = "demo",
        *,
        pool_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> Runtime:
        """:meth:`open` and :meth:`load_weights`."""
        runtime = cls.open(model)
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
            rows = self._pool_rows(pool_bytes)
            model = Llava(self.spec, checkpoint.load_weights(self._directory, progress))
            backend = TorchBackend(model, RowStore(rows, self.kv_shape, model.dtype))
            self._pool = RowPool(rows)
            self._scheduler = Scheduler(self._pool, self.kv_shape.layers)
            self._backend = backend
            self.load_ms = 1000 * (time.perf_counter() - start)

    def _pool_rows(self, pool_bytes: int | None) -> int:
        row = self.kv_shape.row_bytes
        if pool_bytes is None:
            contexts = _DEFAULT_STREAMS * self.spec.text.context * self.kv_shape.layers
            return min(contexts, _DEFAULT_POOL_LIMIT // row)
        if not isinstance(pool_bytes, int) or pool_bytes < row:
            raise BadInput(f"pool_bytes must be a whole number of bytes, at least one row of {row}, not {pool_bytes!r}")
        return pool_bytes // row

    def prepare(self, images: Sequence[ImageSource], prompt: str, options: Options | None = None) -> Request:
        """Check a request and plan its memory, holding nothing.

        Raises :class:`BadInput` for what cannot be answered and :class:`DoesNotFit` for what exceeds its budget.
        """
        options = _checked_options(options)
        if isinstance(images, (str, bytes, os.PathLike)) or not isinstance(images, Sequence):
            raise BadInput("images must be a list of pictures: put a single one into brackets, as in [picture]")
        methods = candidates(options.method, options.parameters, options.kv_budget_bytes is not None)
        first = next(methods)
        token_ids, spans = self._processor.lay_out(len(images), prompt)
        room = self.spec.text.context - len(token_ids)
        if room < 1:
            raise BadInput(
                f"the prompt takes {len(token_ids)} tokens, images included, but the model's context ends at "
                f"{self.spec.text.context}: ask a shorter question or give fewer images"
            )
        max_new_tokens = min(options.max_new_tokens, room)
        shape = prompt_shape(len(token_ids), spans)
        plan = fit(
            itertools.chain((first,), methods), self.kv_shape, shape, max_new_tokens - 1, options.kv_budget_bytes
        )
        return Request(self._processor.read(images, token_ids, spans), options, plan, max_new_tokens)

    def submit(self, request: Request) -> Generation:
        """Queue a prepared request. Raises :class:`DoesNotFit` when even an empty pool could not hold it."""
        with self._lock:
            if self._backend is None:
                self.load_weights()
        peak = request.plan.peak_rows
        if peak > self._pool.capacity:
            row = self.kv_shape.row_bytes
            raise DoesNotFit(
                f"the request may hold {format_size(peak * row)}, but the whole pool has "
                f"{format_size(self._pool.capacity * row)}: load with a larger pool or give the request a KV budget"
            )
        sequence = Running(request, Sampler(request.options), self._processor.detokenizer())
        with self._lock:
            self._scheduler.add(sequence)
        return Generation(self, sequence)

    def generate(self, images: Sequence[ImageSource], prompt: str, options: Options | None = None) -> Generation:
        """Ask about ``images`` (paths, bytes or Pillow images): an iterator of :class:`TokenEvent`.

        The request is queued at once; requests that are open together are decoded together.
        """
        return self.submit(self.prepare(images, prompt, options))

    @property
    def kv_bytes_in_use(self) -> int:
        """Bytes of all rows that requests hold now."""
        return self._pool.rows_in_use * self.kv_shape.row_bytes

    def step(self) -> bool:
        """One prompt, or one token for everybody; False when there is nothing to do.

        What fails in a step ends the requests of that step, each with its error for its own caller. An interrupt ends
        them too, and goes on.
        """
        with self._lock:
            work = self._scheduler.next()
            if work is None:
                return False
            self._stepping = True
            try:
                for sequence, logits in zip(work.sequences, self._forward(work), strict=True):
                    self._emit(sequence, sequence.sampler(logits))
            except BaseException as error:
                self._break_off(work, error)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._stepping = False
                while self._abandoned:
                    self.finish(self._abandoned.popleft(), "cancelled")
            return True

    def _forward(self, work: Work) -> Sequence[Tensor] | Tensor:
        assert self._backend is not None
        if work.prefill:
            return [self._prefill(self._backend, work.sequences[0])]
        tokens = [sequence.token_ids[-1] for sequence in work.sequences]
        return self._backend.decode(tokens, [_cache(sequence) for sequence in work.sequences])

    def _prefill(self, backend: Backend, sequence: Running) -> Tensor:
        prompt, cache = sequence.request.prompt, self._scheduler.admit(sequence)
        start = time.perf_counter()
        features = None if prompt.pixel_values is None else backend.encode_images(prompt.pixel_values)
        encoded = time.perf_counter()
        logits = backend.prefill(prompt, features, cache)
        sequence.encode_seconds = encoded - start
        sequence.prefill_seconds = time.perf_counter() - encoded
        return logits

    def _break_off(self, work: Work, error: BaseException) -> None:
        try:
            for sequence in work.sequences:
                if sequence.result is None:
                    sequence.error = error if isinstance(error, Exception) else None
                    sequence.result = self._result(sequence, "error" if sequence.error else "cancelled")
        finally:
            self._scheduler.drop(work.sequences)

    def _emit(self, sequence: Running, token: int) -> None:
        sequence.latest_token = time.perf_counter()
        if not sequence.token_ids:
            sequence.first_token = sequence.latest_token
        sequence.token_ids.append(token)
        text = sequence.detokenizer.push(token)
        reason = None
        if token in self._processor.eos_token_ids:
            reason = "stop"
        elif len(sequence.token_ids) == sequence.request.max_new_tokens:
            reason = "length"
        if reason:
            text += sequence.detokenizer.finish()
        sequence.text += text
        sequence.events.append(TokenEvent(token, text, reason))
        if reason:
            self.finish(sequence, reason)

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
        request = sequence.request
        images = sum(span.length for span in request.prompt.spans)
        method = request.plan.method
        return Result(
            text=sequence.text,
            token_ids=tuple(sequence.token_ids),
            finish_reason=reason,
            model=self.name,
            backend=self._backend.name if self._backend else "",
            method=method.name,
            settings=asdict(method),  # type: ignore[call-overload]
            usage=Usage(len(request.prompt), images, len(sequence.token_ids)),
            timings=self._timings(sequence),
            kv=_kv_stats(sequence.cache, self.kv_shape, request),
        )

    def _timings(self, sequence: Running) -> Timings:
        steps = max(len(sequence.token_ids) - 1, 0)
        seconds = sequence.latest_token - sequence.first_token
        return Timings(
            load_ms=self.load_ms,
            encode_ms=1000 * sequence.encode_seconds,
            prefill_ms=1000 * sequence.prefill_seconds,
            ttft_ms=1000 * max(sequence.first_token - sequence.submitted, 0.0),
            decode_ms_per_token=1000 * seconds / steps if steps else 0.0,
            tokens_per_s=steps / seconds if seconds else 0.0,
        )


class Generation(Iterator[TokenEvent]):
    """One request's events, in order. Iterating drives the runtime; closing, or dropping it, frees its rows."""

    def __init__(self, runtime: Runtime, sequence: Running) -> None:
        self._runtime = runtime
        self._sequence = sequence

    def __next__(self) -> TokenEvent:
        sequence = self._sequence
        while True:
            # The result is set after the last event, so it is looked at first: another thread may be stepping.
            finished = sequence.result is not None
            if sequence.events:
                return sequence.events.popleft()
            if finished:
                raise sequence.error or StopIteration
            self._step()

    def _step(self) -> None:
        if not self._runtime.step() and self._sequence.result is None:
            raise RuntimeError("this generation belongs to a runtime that no longer knows it")

    @property
    def cache(self) -> SequenceCache | None:
        """The rows that this request holds, for traces and tests; None until it is admitted."""
        return self._sequence.cache

    @property
    def prompt(self) -> Prompt:
        """What the model was given: token ids, image spans and pixels."""
        return self._sequence.request.prompt

    def result(self) -> Result:
        """Run to the end, leaving the events that were not taken, and give the whole answer."""
        while self._sequence.result is None:
            self._step()
        if self._sequence.error:
            raise self._sequence.error
        return self._sequence.result

    def close(self) -> None:
        """Stop here. Rows are free on return; the result says ``cancelled``. Closing twice is safe."""
        self._runtime.finish(self._sequence, "cancelled")

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _checked_options(options: Options | None) -> Options:
    if not isinstance(options, Options | None):
        raise BadInput(f"options must be avl_edge.Options, not {type(options).__name__}")
    return options or Options()


def _cache(sequence: Running) -> SequenceCache:
    assert sequence.cache is not None, "a sequence runs only once it was admitted"
    return sequence.cache


def _kv_stats(cache: SequenceCache | None, shape: KvShape, request: Request) -> KvStats:
    row = shape.row_bytes
    if cache is None:
        return KvStats(0, 0, 0, request.plan.budget, 1.0, 0, ())
    return KvStats(
        bytes_full=(cache.length + cache.step) * shape.layers * row,
        bytes_stored=cache.rows.lease.held * row,
        bytes_peak=cache.rows.lease.peak * row,
        bytes_budget=request.plan.budget,
        rows_read_fraction=cache.rows_read / cache.rows_full if cache.rows_full else 1.0,
        refreshes=cache.refreshes,
        layers=tuple(layer.counts() for layer in cache.rows.layers),
    )
