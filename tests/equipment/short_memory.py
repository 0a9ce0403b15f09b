"""Shared by the tests of runtimes whose machine runs short of memory: one that polls it, its requests and its books."""

from __future__ import annotations

from pathlib import Path

from avl_edge import Formats, Generation, Options, Runtime
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.machines import GB

IMAGE = random_image(3, (120, 80))
PROMPT = "Describe the picture in detail."
FULL = Options(max_new_tokens=30)
AVL = Options(method="avl", parameters={"secondary": 100, "prefill_keep": 100, "core": 40}, max_new_tokens=40)
RESERVE = 2 * GB


def watchful(checkpoint: Checkpoints, tree: Path, *, threaded: bool = False) -> Runtime:
    """A runtime that polls the machine before every step."""
    runtime = Runtime.load(checkpoint("mistral-gqa"), threaded=threaded)
    runtime.keep_free(RESERVE, root=tree, every_ms=0)
    return runtime


def ask(runtime: Runtime, options: Options = FULL) -> Generation:
    return runtime.generate([IMAGE], PROMPT, options)


def check(runtime: Runtime, *alive: Generation) -> None:
    caches = [each.cache for each in alive if each.cache]
    runtime.debug.pool.check_integrity([cache.rows for cache in caches])
    for each in alive:
        lease = each.cache.rows.lease if each.cache else None
        assert lease is None or lease.held <= lease.limit <= each.request.plan.pages


def formats_of(generation: Generation) -> Formats:
    assert generation.cache is not None
    return generation.cache.formats
