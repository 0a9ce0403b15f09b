"""Random methods and formats for sequences of three layers, over which the pool is tried."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from avl_edge.config import Formats
from avl_edge.kv.methods import H2O, Avl, Coarse, Distinct, FastV, Full, Method, Streaming

LAYERS = 3
NAMES = ("exact", "int8", "int8/int4", "int4")


def methods() -> st.SearchStrategy[Method]:
    """Every method but AttentionPack, whose rows are low-rank."""
    percent = st.integers(1, 100)
    triple = st.tuples(percent, percent, percent).map(lambda values: sorted(values, reverse=True))
    avl = st.builds(
        lambda psc, k, t, floor, each: Avl(
            *map(float, psc), refresh=k, text_keep=t, text_floor=floor, prune_layer=1, per_span=each
        ),
        triple,
        st.integers(0, 4),
        percent,
        st.integers(1, 8),
        st.integers(0, 1),
    )
    coarse = st.builds(lambda sc, mass: Coarse(max(sc), min(sc), mass), st.tuples(percent, percent), percent)
    h2o = st.builds(H2O, budget=percent, heavy=st.integers(0, 100), grow=st.integers(0, 1))
    fastv = st.builds(FastV, layer=st.integers(1, LAYERS + 1), drop=st.integers(0, 100))
    streaming = st.builds(Streaming, sinks=st.integers(0, 8), window=st.integers(1, 60))
    distinct = st.builds(Distinct, percent)
    return st.one_of(st.just(Full()), avl, avl, avl, coarse, distinct, h2o, fastv, streaming)


def sharing_methods() -> st.SearchStrategy[Method]:
    """Methods that store every image row."""
    percent = st.integers(1, 100)
    avl = st.builds(
        lambda core, k, t, floor: Avl(100, 100, core, k, t, text_floor=floor),
        percent,
        st.integers(0, 4),
        percent,
        st.integers(1, 8),
    )
    coarse = st.builds(lambda core, mass, by: Coarse(100, core, mass, by), percent, percent, st.integers(0, 1))
    return st.one_of(st.just(Full()), avl, coarse)


def choices(names: Sequence[str] = NAMES) -> st.SearchStrategy[tuple[Method, Formats]]:
    """A method, and a format of ``names`` for each tier; those that look at coarse keys have one for all image rows."""
    return st.builds(_choice, methods(), *[st.sampled_from(names)] * 3)


def _choice(method: Method, text: str, core: str, secondary: str) -> tuple[Method, Formats]:
    return method, Formats(text, core, core if isinstance(method, Coarse) else secondary)
