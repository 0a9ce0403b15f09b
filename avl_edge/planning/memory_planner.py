"""Requests and the pool, planned within the memory of the process where that is bounded."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Options, Picture, PromptShape, format_size
from ..errors import TooLarge
from ..kv.budget import KvPlan
from ..kv.layout import page_bytes
from ..kv.methods import Method
from ..machine import allocator
from ..machine.ledger import Ledger
from .device_watcher import DeviceState
from .process_memory import PIXELS_BYTES
from .request_planner import RequestPlanner


class MemoryPlanner:
    """Divides ``max_memory`` bytes (None: no bound) among the entries of ``ledger``, and plans by what these hold.

    What the process holds now is what it had before. Raises as :meth:`RequestPlanner.process_memory`.
    """

    def __init__(self, planner: RequestPlanner, max_memory: int | None) -> None:
        self._planner, self._page = planner, page_bytes(planner.shape)
        self.ledger, process = Ledger(max_memory), allocator.resident_bytes()
        self._memory = None if max_memory is None else planner.process_memory(max_memory, process)
        if self._memory:
            self.ledger.divide(self._memory.limits(0))
            self.ledger["activations"].fixed = self._memory.conversions
        else:
            self.ledger.divide({"features": planner.most_features, "pixels": PIXELS_BYTES})
        self.ledger["process"].fixed, self.ledger["libraries"].fixed = process, planner.target.library_bytes

    def pool_pages(self, pool_bytes: int | None) -> int:
        """How many pages a pool of ``pool_bytes`` has, for which the ledger is divided from now on; None takes what the
        longest prompt leaves, or as :meth:`RequestPlanner.pool_pages`. Raises :class:`TooLarge`."""
        memory = self._memory
        if memory is None:
            return self._planner.pool_pages(pool_bytes)
        if pool_bytes is None:
            longest = self._planner.workspace(self._planner.longest, 0).prompt_bytes
            memory.require(longest, self._page, "the longest prompt")
            pool_bytes = memory.kv_bytes(longest)
        pages = self._planner.pool_pages(pool_bytes)
        memory.require(0, pages * self._page, f"a pool of {format_size(pages * self._page)}")
        self.ledger.divide(memory.limits(pages * self._page))
        return pages

    def kv_bytes_left(self, prompt_bytes: int, pool_pages: int) -> int | None:
        """What may be held by the rows of requests beside the workspace of a prompt: the pool, once it has pages. None
        where memory is not bounded."""
        if self._memory is None:
            return None
        return pool_pages * self._page if pool_pages else max(1, self._memory.kv_bytes(prompt_bytes))

    def plan(
        self,
        pool_pages: int,
        options: Options,
        prompt: PromptShape,
        steps: int,
        state: DeviceState | None = None,
        pictures: Sequence[Picture] | None = None,
        pixel_bytes: int = 0,
    ) -> KvPlan[Method]:
        """:meth:`RequestPlanner.plan`, before there is a pool (``pool_pages`` 0) within what the process may take
        beside ``pixel_bytes`` of ``pictures``."""
        prompt_bytes = self._planner.workspace(prompt, steps, pictures).prompt_bytes
        if pool_pages:
            self.ledger["activations"].require_possible(prompt_bytes, "the prompt")
        what = f"{prompt.length} prompt tokens and {steps + 1} new ones"
        try:
            left = self.kv_bytes_left(prompt_bytes, pool_pages)
            pages = pool_pages or self._planner.pool_pages(None)
            plan = self._planner.plan(pages, options, prompt, steps, state, left)
        except TooLarge as error:
            self.require(prompt_bytes, error.smallest or 0, pool_pages, what, pixel_bytes)
            raise
        self.require(prompt_bytes, plan.peak_bytes, pool_pages, what, pixel_bytes)
        return plan

    def require(self, prompt_bytes: int, kv_bytes: int, pool_pages: int, what: str, pixel_bytes: int = 0) -> None:
        """Raise :class:`TooLarge`, naming the least memory that would do, where ``what``, which needs a pool of
        ``kv_bytes`` beside ``pixel_bytes`` and the workspace of a prompt, does not fit. Once there is a pool, that says
        what fits."""
        if self._memory and not pool_pages:
            self._memory.require(prompt_bytes, kv_bytes, what, pixel_bytes)
