"""The parts of a runtime, for those who look into it: tests, traces and tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..backends.base import Backend
from ..backends.stored import StoredRows
from ..kv.pool import RowPool
from ..machine.ledger import Ledger
from ..machine.pressure import Monitor
from ..model.features import FeatureCache
from ..planning.device_watcher import DeviceWatcher
from .engine import Engine
from .engine_loop import EngineLoop
from .scheduler import Scheduler


@dataclass(frozen=True)
class RuntimeView:
    """What a runtime consists of at the moment that :attr:`avl_edge.Runtime.debug` was asked for.

    These are the runtime's own objects, no copies. Look at them between two steps, which is when ``engine.call`` calls
    a function, and leave them as they are: who changes them, or calls what does, breaks what was promised to requests.
    Which parts there are may change with any version.

    ``engine`` runs them; one that is not threaded is stepped by ``engine.run_once``. ``backend`` computes; None before
    the weights are loaded, as ``rows`` and ``features`` are. ``scheduler`` has the requests that are ``waiting`` and
    ``running``, and the ``prefixes`` of image sessions. ``pool`` says which rows are whose (``check_integrity`` raises
    where its books are not in order), ``rows`` have their tensors in a ``store``.
    Loading makes a scheduler and a pool of the asked size. ``features`` are those of pictures that were encoded lately.
    ``ledger`` counts what all of it holds, by kind; :meth:`~avl_edge.Runtime.memory` is its word at one moment.
    ``monitor`` polls the machine's memory for :meth:`~avl_edge.Runtime.keep_free`, ``device_watcher`` its profile for
    :meth:`~avl_edge.Runtime.follow`; None where nobody asked for that.

    ``replace_backend`` takes another backend, such as one that wraps ``backend`` and records what it gives: it computes
    from the next step on, over the same rows, and every picture is encoded anew.
    """

    engine: Engine
    backend: Backend | None
    scheduler: Scheduler
    pool: RowPool
    rows: StoredRows | None
    features: FeatureCache | None
    ledger: Ledger
    monitor: Monitor | None
    device_watcher: DeviceWatcher | None
    replace_backend: Callable[[Backend], None]

    @classmethod
    def of(cls, engine: Engine, loop: EngineLoop, watcher: DeviceWatcher | None) -> RuntimeView:
        """Of the runtime that these are the parts of."""
        return cls(
            engine=engine,
            backend=loop.backend,
            scheduler=loop.scheduler,
            pool=loop.pool,
            rows=loop.backend.rows if loop.backend else None,
            features=loop.features,
            ledger=loop.ledger,
            monitor=loop.monitor,
            device_watcher=watcher,
            replace_backend=lambda backend: engine.call(lambda: loop.use(backend)),
        )
