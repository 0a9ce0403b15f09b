"""Giving memory back while requests run: smaller formats first, then fewer rows, then no new requests.

What a request gave it does not get again: its answer goes on with the smaller rows, and the next one begins anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..backends.stored import StoredRows
from ..config import Formats, format_size
from ..kv.budget import Held, pages_from_now
from ..kv.cache import prompt_shape
from ..kv.pool import RowPool
from ..kv.pool.compaction import smaller_formats
from ..machine.pressure import Action, Monitor
from ..model.features import FeatureCache
from .requests import Running
from .scheduler import Scheduler

_log = logging.getLogger("avl_edge")

Broken = Callable[[Running, BaseException], None]


class MemoryPressureHandler:
    """What ``monitor`` asks for, carried out on the requests that run in ``scheduler``.

    ``rows``: where the rows lie; None: they can be neither moved nor given back, only admission stops. ``features`` of
    earlier pictures go first.
    """

    def __init__(
        self,
        monitor: Monitor,
        pool: RowPool,
        rows: StoredRows | None,
        scheduler: Scheduler,
        features: FeatureCache | None = None,
    ) -> None:
        self._monitor, self._pool, self._rows, self._scheduler = monitor, pool, rows, scheduler
        self._features = features

    def check(self, broken: Broken) -> None:
        """Between two steps: poll the monitor, where it is time, and escalate by one level.

        ``broken`` gets a request that an error, or an interrupt, caught in the middle of it.
        """
        if not self._monitor.is_due:
            return
        smaller: list[tuple[Running, Formats]] = []
        evictable: list[Running] = []

        def gives() -> tuple[bool, bool]:
            # Not those whose prompt is half-way: what they need in the end is not to be told from what they hold.
            running = [each for each in self._scheduler.decoding if self._rows and not each.admitted_cache.rows.borrows]
            smaller.extend((each, formats) for each in running if (formats := self.smaller(each)))
            evictable.extend(each for each in running if each.admitted_cache.can_evict)
            return bool(smaller), bool(evictable)

        action = self._monitor.poll(gives)
        self._admit(action)
        if action in (Action.FREE, Action.STAY):
            return
        if self._features:
            self._features.forget()
        self._give_back()
        if action is Action.DEMOTE:
            for sequence, formats in smaller:
                self._take(sequence, broken, partial(self._demote, formats=formats))
        elif action is Action.EVICT:
            for sequence in evictable:
                self._take(sequence, broken, self._evict)

    def _admit(self, action: Action) -> None:
        if action is Action.HOLD and not self._scheduler.is_held:
            self._scheduler.hold()
            _log.warning(
                "avl-edge: memory is short (%s): new requests wait, %g s at most",
                self._monitor.describe(),
                self._monitor.most_wait_s,
            )
        if action is Action.FREE and self._scheduler.is_held:
            self._scheduler.resume()
            _log.warning("avl-edge: there is memory again (%s): requests are admitted", self._monitor.describe())

    def _take(self, sequence: Running, broken: Broken, respond: Callable[[Running], None]) -> None:
        held = sequence.admitted_cache.rows.lease.held
        try:
            respond(sequence)
            back = self._give_back()
        except BaseException as error:
            broken(sequence, error)
            if not isinstance(error, Exception):
                raise
            return
        stats = sequence.pressure
        sequence.pressure = replace(stats, bytes_given_back=stats.bytes_given_back + back)
        cache = sequence.admitted_cache
        _log.info(
            "avl-edge: memory is short (%s): a request holds %d pages instead of %d, its rows are %s",
            self._monitor.describe(),
            cache.rows.lease.held,
            held,
            cache.formats.by_tier(),
        )

    def _demote(self, sequence: Running, formats: Formats) -> None:
        assert self._rows is not None
        done = self._rows.demote(sequence.admitted_cache, formats)
        assert done, "what the rows need in the end is less than the lease, so there is room on the way"
        self._shrink_lease(sequence)
        stats = sequence.pressure
        sequence.pressure = replace(stats, demotions=stats.demotions + 1)

    def _evict(self, sequence: Running) -> None:
        assert self._rows is not None
        cache = sequence.admitted_cache
        freed = cache.evict()
        self._rows.compact(cache)
        self._shrink_lease(sequence)
        stats = sequence.pressure
        sequence.pressure = replace(stats, rows_evicted=stats.rows_evicted + freed)

    def smaller(self, sequence: Running) -> Formats | None:
        """The next formats that the request's rows can go into, of those that make its promise smaller."""
        cache, formats = sequence.admitted_cache, sequence.admitted_cache.formats
        while following := smaller_formats(formats, cache.has_one_tier, self._pool.shape):
            formats = following
            images = formats.core != cache.formats.core
            changes = any((rows.core if images else ~rows.core).any() for rows in cache.rows)
            if changes and self._pages(sequence, formats) < cache.rows.lease.limit:
                return formats
        return None

    def _shrink_lease(self, sequence: Running) -> None:
        cache = sequence.admitted_cache
        lease = cache.rows.lease
        self._pool.shrink_lease(lease, min(lease.limit, self._pages(sequence, cache.formats)))

    def _pages(self, sequence: Running, formats: Formats) -> int:
        """The most pages that the request may still hold, in ``formats``."""
        request, layers = sequence.request, sequence.admitted_cache.rows.layers
        core = sum(int(rows.core.sum()) for rows in layers)
        secondary = sum(len(rows.core) for rows in layers) - core
        held = Held(core, secondary, sum(len(rows.basis) for rows in layers))
        prompt = prompt_shape(len(request.prompt), request.prompt.spans)
        steps = request.max_new_tokens - 1
        return pages_from_now(request.plan.method, formats, self._pool.shape, prompt, steps, held)

    def _give_back(self) -> int:
        """Pages that nobody holds go back to the operating system."""
        pages = self._pool.take_dirty_pages()
        back = self._rows.give_back(pages) if self._rows else 0
        if back:
            _log.debug("avl-edge: %s went back to the system", format_size(back))
        return back
