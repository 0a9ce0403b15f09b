"""How a service stands at one moment, for ``/metrics``."""

from __future__ import annotations

from dataclasses import replace

from ..errors import AvlEdgeError
from ..machine import pressure
from ..serving.runtime import Runtime
from .metrics import Moment
from .service import Service


def look(service: Service, connections: int) -> Moment:
    """Waits for the layer or step that the engine is running, where it runs."""
    runtime, held = service.runtime, service.held
    memory, machine = runtime.memory(), _machine()
    return replace(
        _engine(runtime),
        on_their_way=service.on_their_way,
        connections=connections,
        held_pictures=len(held),
        held_picture_bytes=held.nbytes,
        sent_picture_bytes=service.sent.nbytes,
        memory={name: entry.used for name, entry in memory.entries.items()},
        memory_limit=memory.limit,
        available_bytes=machine.available_bytes,
        stall_percent=machine.stall_percent,
        is_ready=service.state == "ready",
        power_mode=_power_mode(runtime),
    )


def _machine() -> pressure.Pressure:
    try:
        return pressure.read()
    except AvlEdgeError:
        return pressure.Pressure()


def _power_mode(runtime: Runtime) -> str | None:
    watcher = runtime.debug.device_watcher
    return watcher.state().stats.power_mode if watcher else None


def _engine(runtime: Runtime) -> Moment:
    """Looked at between two layers or steps, by the engine's own thread."""

    def count() -> Moment:
        view = runtime.debug
        scheduler, pool = view.scheduler, view.pool
        tiers = {"text": 0, "core": 0, "secondary": 0}
        return Moment(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pool_bytes=pool.pages * pool.page_bytes,
            pool_bytes_promised=(pool.pages - pool.pages_unreserved) * pool.page_bytes,
            pool_bytes_in_use=pool.bytes_in_use,
            tier_bytes=tiers,
        )

    try:
        return runtime.engine.call(count) if runtime.debug.backend else Moment()
    except AvlEdgeError:
        return Moment()
