"""The loop: schedule, forward, sample, emit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from torch import Tensor

from . import checkpoint
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
from .scheduler import Request, Scheduler, Work
from .scheduler import Sequence as Active
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
        self._pool = RowPool(0)
        self._backend: Backend | None = None
        self._scheduler = Scheduler(self._pool, shape.layers)

    @classmethod
    def open(cls, model: str | os.PathLike[str] = "demo") -> Runtime:
        """Read and check the small files of ``model``: "demo", or a checkpoint directory (:class:`BadModel`)."""
        directory = DEMO if model == "demo" else Path(model)
        if not directory.is_dir():
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
        """Map the weights and reserve the pool, once, for all requests: ``pool_bytes``, or four full contexts."""
        start = time.perf_counter()
        weights = checkpoint.load_weights(self._directory, progress)
        rows = self.kv_shape.layers * self.spec.text.context * _DEFAULT_STREAMS
        limit = _DEFAULT_POOL_LIMIT if pool_bytes is None else pool_bytes
        rows = limit // self.kv_shape.row_bytes if pool_bytes else min(rows, limit // self.kv_shape.row_bytes)
        self._pool = RowPool(rows)
        self._scheduler = Scheduler(self._pool, self.kv_shape.layers)
        model = Llava(self.spec, weights)
        self._backend = TorchBackend(model, RowStore(rows, self.kv_shape, model.dtype))
        self.load_ms = 1000 * (time.perf_counter() - start)

    def prepare(self, images: Sequence[ImageSource], prompt: str, options: Options | None = None) -> Request:
        """Check a request and plan its memory, holding nothing.

        Raises :class:`BadInput` for what cannot be answered and :class:`DoesNotFit` for what exceeds its budget.
        """
        options = options or Options()
        methods = candidates(options.method, options.parameters, options.kv_budget is not None)
        first = next(methods)
        prepared = self._processor(images, prompt)
        room = self.spec.text.context - len(prepared)
        if room < 1:
            raise BadInput(
                f"the prompt takes {len(prepared)} tokens, images included, but the model's context ends at "
                f"{self.spec.text.context}: ask a shorter question or give fewer images"
            )
        max_new_tokens = min(options.max_new_tokens, room)
        shape = prompt_shape(len(prepared), prepared.spans)
        plan = fit((first, *methods), self.kv_shape, shape, max_new_tokens - 1, options.kv_budget)
        return Request(prepared, options, plan, max_new_tokens)

    def submit(self, request: Request) -> Generation:
        """Queue a prepared request. Raises :class:`DoesNotFit` when even an empty pool could not hold it."""
        if self._backend is None:
            self.load_weights()
        peak = request.plan.peak_rows
        if peak > self._pool.capacity:
            row = self.kv_shape.row_bytes
            raise DoesNotFit(
                f"the request may hold {format_size(peak * row)}, but the whole pool has "
                f"{format_size(self._pool.capacity * row)}: load with a larger pool or give the request a KV budget"
            )
        sequence = Active(request, Sampler(request.options), self._processor.detokenizer())
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
        """One prompt or one token for everybody; False when there is nothing to do."""
        with self._lock:
            work = self._scheduler.next()
            if work is None:
                return False
            try:
                logits = self._forward(work)
                for sequence, row in zip(work.sequences, logits, strict=True):
                    self._emit(sequence, sequence.sampler(row))
            except BaseException:
                # What was half done cannot be told apart from what was not: all of this step's requests end.
                for sequence in work.sequences:
                    self.finish(sequence, "error")
                raise
            return True

    def _forward(self, work: Work) -> Sequence[Tensor] | Tensor:
        assert self._backend is not None
        if work.prefill:
            return [self._prefill(work.sequences[0])]
        tokens = [sequence.token_ids[-1] for sequence in work.sequences]
        return self._backend.decode(tokens, [_cache(sequence) for sequence in work.sequences])

    def _prefill(self, sequence: Active) -> Tensor:
        assert self._backend is not None
        prompt = sequence.request.prompt
        start = time.perf_counter()
        features = None if prompt.pixel_values is None else self._backend.encode_images(prompt.pixel_values)
        encoded = time.perf_counter()
        logits = self._backend.prefill(prompt, features, _cache(sequence))
        sequence.encode_seconds = encoded - start
        sequence.prefill_seconds = time.perf_counter() - encoded
        return logits

    def _emit(self, sequence: Active, token: int) -> None:
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

    def finish(self, sequence: Active, reason: str) -> None:
        """End a request for ``reason``: its result is fixed, its rows are free. Safe to call twice."""
        with self._lock:
            if sequence.result is None:
                sequence.result = self._result(sequence, reason)
            self._scheduler.remove(sequence)

    def _result(self, sequence: Active, reason: str) -> Result:
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

    def _timings(self, sequence: Active) -> Timings:
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

    def __init__(self, runtime: Runtime, sequence: Active) -> None:
        self._runtime = runtime
        self._sequence = sequence

    def __next__(self) -> TokenEvent:
        events = self._sequence.events
        while not events:
            if self._sequence.result is not None:
                raise StopIteration
            self._runtime.step()
        return events.popleft()

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
            self._runtime.step()
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


def _cache(sequence: Active) -> SequenceCache:
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
