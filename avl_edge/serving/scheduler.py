"""Who may run next: requests wait in order until the pool can promise their worst case, then run together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from ..config import format_size, require
from ..errors import TooLarge
from ..kv.cache import SequenceCache
from ..kv.pool import RowPool
from ..kv.shared_prefix import QuestionCache, SharedPrefixCache
from ..machine.ledger import Entry
from .requests import Request, Running, SharedPrefix
from .schedule_policy import Advance, Decode, FirstComeFirstServed, SchedulePolicy

NO_ROOM = (
    "open image sessions hold the rows that this needs, and nobody is running: close one, or load with a larger pool"
)
"""Why :attr:`Scheduler.stuck` is refused."""
SESSION_CLOSED = "the session is closed: open the pictures again to ask about them"
"""Why a question about one is refused."""


class Scheduler:
    """Keeps who waits and who runs, in ``pool``, and admits by its promises; ``policy`` says in which order, and what
    comes next."""

    def __init__(
        self, pool: RowPool, layers: int, policy: SchedulePolicy | None = None, activations: Entry | None = None
    ) -> None:
        """``activations``: under which what requests take beside their rows is counted."""
        self._pool = pool
        self._activations = activations or Entry("activations")
        self._layers = layers
        self._policy = policy or FirstComeFirstServed()
        self._waiting: list[Running] = []  # for their first token; prompts that are half-way among them
        self._decoding: list[Running] = []
        self._prefixes: list[SharedPrefix] = []  # those that have rows, or are about to
        self._held_since: float | None = None
        self._held_seconds = 0.0

    @property
    def requests(self) -> tuple[Running, ...]:
        """Every request on its way."""
        return tuple(dict.fromkeys((*self._waiting, *self._decoding)))

    @property
    def running(self) -> tuple[Running, ...]:
        """The requests that hold rows; of some the prompt is half-way."""
        return tuple(each for each in self.requests if each.cache)

    @property
    def decoding(self) -> tuple[Running, ...]:
        """The requests that have their first token."""
        return tuple(self._decoding)

    @property
    def waiting(self) -> tuple[Running, ...]:
        """The requests that wait to be admitted, in the order in which they came."""
        return tuple(each for each in self._waiting if each.prompt_task is None)

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
        """Raise :class:`TooLarge` for a request that would not fit if it were alone."""
        self._activations.require_possible(request.workspace.prompt_bytes, "the prompt")
        if sum(plan.pages for plan in request.plans) > self._pool.pages:
            peak = sum(plan.peak_bytes for plan in request.plans)
            raise TooLarge(
                f"the request may hold {format_size(peak)}, but the whole pool has "
                f"{format_size(self._pool.pages * self._pool.page_bytes)}: load with a larger pool or give the request "
                f"a KV budget"
            )

    def add(self, sequence: Running) -> None:
        """Queue a request, once; :class:`BadInput` for a question about an image session that was closed."""
        prefix = sequence.request.prefix
        require(not (prefix and prefix.is_closed), SESSION_CLOSED)
        if prefix and prefix.is_ready:
            sequence.pixels = None
        if prefix:
            prefix.used = time.perf_counter()
        if sequence not in self._waiting:
            sequence.held = (self._held_clock(), None)
            self._waiting.append(sequence)

    def next(self, now: float) -> Advance | Decode | None:
        """What to do at ``now`` (seconds, perf_counter's); None when nothing is running or can be admitted."""
        return self._policy.choose(self._prompts(now), self.decoding, now)

    def _prompts(self, now: float) -> list[Running]:
        """Those whose prompts may be run, the most urgent first: half-way ones, and whom the pool has room for.

        Who does not fit is not overtaken by others that do; but where nobody runs, whose end it could wait for, it may
        be the first that fits: a question about an image session that holds the rows, and may be the last one about it.
        """
        found: list[Running] = []
        alone = not self._decoding and not any(each.prompt_task for each in self._waiting)
        admits = not self.is_held
        for each in self._policy.order(self._waiting, now) if self._waiting else ():
            # A question whose picture another one is running waits for that one, however urgent it is.
            runner = each.request.prefix.runner if each.request.prefix else None
            sequence = runner or each
            if sequence.prompt_task:
                found += [sequence] if sequence not in found else []
            elif admits:
                fits = self._fits(sequence)
                found += [sequence] if fits else []
                admits = fits or alone
        return found

    def _fits(self, sequence: Running) -> bool:
        if not self._activations.fits(sequence.request.workspace.prompt_bytes):
            return False
        promised = sum(_unleased(each) for each in self._waiting if each.prompt_task)
        missing = _unleased(sequence) + promised - self._pool.pages_unreserved
        return missing <= 0 or self._give_up_spare(missing)

    def _give_up_spare(self, missing: int) -> bool:
        """Close image sessions that were kept in case somebody asks again, the longest unused first, until there are
        the ``missing`` pages; none where they are too few."""
        wanted = {each.request.prefix for each in self.requests}
        spare = [each for each in self._prefixes if each.is_spare and each.cache and each not in wanted]
        if sum(each.plan.pages for each in spare) < missing:
            return False
        before = self._pool.pages_unreserved
        for prefix in sorted(spare, key=lambda each: each.used):
            if self._pool.pages_unreserved - before >= missing:
                break
            prefix.is_closed = True
            self.free_image_sessions()
        return self._pool.pages_unreserved - before >= missing

    @property
    def stuck(self) -> Running | None:
        """Who waits in vain where :meth:`next` finds nobody: no request's end makes room, as open image sessions hold
        the rows."""
        if not self._waiting or self._decoding or self.is_held or self._prompts(time.perf_counter()):
            return None
        return self._waiting[0]

    def begin(self, sequence: Running) -> None:
        """Its prompt, or the pictures of its image session, begin to run."""
        self._activations.hold(sequence, sequence.request.workspace.prompt_bytes, "the prompt")

    def admit(self, sequence: Running) -> SequenceCache:
        """The cache of a sequence whose prompt runs now, under a lease of its worst case; of a question about an image
        session once :meth:`admit_prefix` has made the prefix's cache."""
        request = sequence.request
        prompt, shared = request.prompt, request.prefix.cache if request.prefix else None
        sequence.held = (sequence.held[0], self._held_clock())
        if shared:
            sequence.cache = QuestionCache(shared, request.plan, len(prompt), prompt.spans, prompt.rope)
        else:
            sequence.cache = SequenceCache(
                self._pool, request.plan, len(prompt), prompt.spans, self._layers, rope=prompt.rope
            )
        return sequence.cache

    def admit_prefix(self, prefix: SharedPrefix, runner: Running) -> SharedPrefixCache:
        """The cache of an image session whose first question, its ``runner``, is admitted, under a lease of its worst
        case."""
        # Listed before there is anything to free: an interrupt may fall in between.
        prefix.runner = runner
        if prefix not in self._prefixes:
            self._prefixes.append(prefix)
        prompt = prefix.prompt
        prefix.cache = SharedPrefixCache(self._pool, prefix.plan, len(prompt), prompt.spans, self._layers, prompt.rope)
        return prefix.cache

    def finish_prefix(self, prefix: SharedPrefix) -> None:
        """The rows of an image session are written: nobody needs its pixels any more."""
        prefix.is_ready, prefix.runner, prefix.pixels = True, None, None
        for each in self.requests:
            if each.request.prefix is prefix:
                each.pixels = None

    def start(self, sequence: Running) -> None:
        """Its prompt has run: it has its first token, and gets one more in each step."""
        # In both lists for a moment, rather than in none: an interrupt may fall in between.
        if sequence not in self._decoding:
            self._decoding.append(sequence)
        sequence.prompt_task = None
        self._activations.hold(sequence, sequence.request.workspace.step_bytes, "a step")
        if sequence in self._waiting:
            self._waiting.remove(sequence)

    def remove(self, sequence: Running) -> None:
        """Take a request out, wherever it stands, and free its rows. Safe to call twice."""
        self._forget((sequence,))
        if sequence.cache:
            sequence.cache.close()
        self.free_image_sessions()

    def free_image_sessions(self) -> None:
        """Free the rows of image sessions that were closed, where no question about them is on its way, and those that
        were not yet complete when who ran them ended."""
        for prefix in tuple(self._prefixes):
            if not self._is_wanted(prefix):
                self._prefixes.remove(prefix)
                if prefix.cache:
                    prefix.cache.close()
                    prefix.cache, prefix.is_ready = None, False

    def _is_wanted(self, prefix: SharedPrefix) -> bool:
        if not prefix.is_ready:
            return prefix.runner is not None
        return not prefix.is_closed or any(each.request.prefix is prefix for each in self.requests)

    def drop(self, sequences: Iterable[Running]) -> None:
        """Take out requests whose step broke off anywhere; the pool's books are made anew from the others."""
        sequences = tuple(sequences)
        self._forget(sequences)
        for sequence in sequences:
            sequence.cache = None
        for prefix in self._prefixes:
            if not self._is_wanted(prefix):
                prefix.cache, prefix.is_ready = None, False
        self._prefixes = [prefix for prefix in self._prefixes if prefix.cache]
        caches = (*(other.cache for other in self.requests), *(prefix.cache for prefix in self._prefixes))
        self._pool.rebuild(cache.rows for cache in caches if cache)

    def _forget(self, sequences: Sequence[Running]) -> None:
        for sequence in sequences:
            sequence.prompt_task = sequence.pixels = None
            self._activations.release(sequence)
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            if sequence in self._decoding:
                self._decoding.remove(sequence)
        for prefix in self._prefixes:
            if prefix.runner in sequences:
                prefix.runner = None


def _unleased(sequence: Running) -> int:
    """The pages that a request needs and has no lease of yet: its own come after those of its image session."""
    request = sequence.request
    own = 0 if sequence.cache else request.plan.pages
    return own + (request.prefix.plan.pages if request.prefix and not request.prefix.cache else 0)
