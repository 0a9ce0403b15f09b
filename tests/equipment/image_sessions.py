"""Shared by the tests of image sessions: pictures, questions, options that share rows, and the state of a runtime's
books."""

from __future__ import annotations

from avl_edge import Generation, Options, Runtime
from tests.equipment.checkpoints import random_image

IMAGES = [random_image(1, (70, 90)), random_image(2, (200, 64))]
FIRST, SECOND = "What is shown in this picture?", "How many boats are there, and what colour is the car?"
WHOLE = {"secondary": 100, "prefill_keep": 100}
FULL = Options(max_new_tokens=24)
AVL = Options(method="avl", parameters={**WHOLE, "core": 30, "text_floor": 4, "text_keep": 60}, max_new_tokens=24)
COARSE = Options(method="coarse", parameters={"core": 30, "mass": 80}, max_new_tokens=24)
PROMPT_MEAN = Options(method="avl", parameters={**WHOLE, "core": 20, "prompt_mean": 1, "refresh": 2}, max_new_tokens=24)


def check(runtime: Runtime, *questions: Generation) -> None:
    """The books are in order, and hold nothing but the rows of ``questions`` and of image sessions."""
    caches = [each.cache for each in questions if each.cache]
    assert len(caches) == len(questions)
    sessions = [prefix.cache for prefix in runtime.debug.scheduler.prefixes if prefix.cache]
    runtime.debug.pool.check_integrity([cache.rows for cache in (*caches, *sessions)])
    assert runtime.kv_bytes_in_use == sum(cache.rows.lease.nbytes for cache in (*caches, *sessions))


def is_empty(runtime: Runtime) -> bool:
    return runtime.kv_bytes_in_use == 0 and runtime.debug.pool.pages_unreserved == runtime.debug.pool.pages
