"""From a conversation to a request that is checked and planned, holding nothing but its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Options, checked_options
from ..kv.cache import prompt_shape
from ..model.prompt import Message, Processor, check_messages, shown_in, turns_of
from ..planning.device_watcher import DeviceState
from ..planning.memory_planner import MemoryPlanner
from ..planning.request_planner import RequestPlanner
from .picture_reader import PictureReader
from .requests import Request


@dataclass(frozen=True)
class Preparer:
    """Lays out, plans and reads what is asked of one model."""

    processor: Processor
    planner: RequestPlanner
    memory: MemoryPlanner
    read_pictures: PictureReader

    def __call__(
        self, messages: Sequence[Message], options: Options | None, pool_pages: int, state: DeviceState | None
    ) -> Request:
        """As :meth:`avl_edge.Runtime.prepare_chat` says, for a pool of so many pages and a device in that state."""
        options = checked_options(options)
        check_messages(messages)
        images, processor = shown_in(messages), self.processor.within(options)
        pictures = self.read_pictures.measure(processor, images)
        laid_out = processor.lay_out(turns_of(messages, pictures))
        max_new_tokens = self.planner.new_tokens(len(laid_out), options)
        shape, steps = prompt_shape(len(laid_out), laid_out.spans), max_new_tokens - 1
        pixel_bytes = self.read_pictures.pixel_bytes(processor, pictures)
        plan = self.memory.plan(pool_pages, options, shape, steps, state, pictures, pixel_bytes)
        workspace, device = self.planner.workspace(shape, steps, pictures), state.stats if state else None
        read = self.read_pictures(processor, images, pictures, laid_out)
        return Request(read, options, plan, max_new_tokens, device, workspace=workspace)
