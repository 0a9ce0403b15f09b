"""The GPU backend beside the oracle: two sides that are given the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from avl_edge.backends.base import run_whole
from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.config import Formats
from avl_edge.kv.budget import kv_plan, plan_after
from avl_edge.kv.cache import SequenceCache, prompt_shape
from avl_edge.kv.methods import H2O, AttentionPack, Avl, Distinct, FastV, Full, Method, Streaming
from avl_edge.kv.pool import RowPool
from avl_edge.kv.shared_prefix import QuestionCache, SharedPrefixCache
from avl_edge.kv.store import RowStore
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec
from avl_edge.model.families.llava import LlavaSpec
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.request import ImageSpan, Prompt
from tests.equipment.cuda_on_cpu import HostDevice, backend_for
from tests.equipment.pixels import as_pixels

METHODS: dict[str, Method] = {
    "full": Full(),
    "avl": Avl(refresh=3, text_floor=4),
    "avl-often": Avl(prefill_keep=80, secondary=60, core=20, refresh=2, text_keep=50, text_floor=2, prune_layer=1),
    "avl-mean": Avl(prompt_mean=1, text_keep=100),
    "h2o": H2O(),
    "fastv": FastV(),
    "streaming": Streaming(),
    "attentionpack": AttentionPack(),
    "distinct": Distinct(60),
}
FORMATS_OF: dict[str, Formats] = {
    "int8": Formats("int8", "int8", "int8"),
    "int4": Formats("int4", "int4", "int4"),
    "falling": Formats("exact", "int8", "int4"),
    "text packed": Formats("int8", "exact", "int8"),
}
# Text is packed as it comes, where the two sides' last bits differ: one may round to the next number.
STEP_OF = {"exact": 1e-4, "int8": 1 / 254, "int4": 1 / 14}
STEPS = 8
Request = tuple[Prompt, Method, Formats]


def random_prompt(spec: LlavaSpec, seed: int, text: int = 12, images: int = 1) -> Prompt:
    """A prompt with pictures in its middle."""
    rng = np.random.default_rng(seed)
    length = spec.tokens_per_image
    ids = rng.integers(10, 300, text + images * length + text // 2)
    spans = tuple(ImageSpan(f"{seed}{i}", 3 + text // 2 + i * (length + 1), length) for i in range(images))
    side = spec.vision.image_size
    pixels = rng.standard_normal((images, 3, side, side), dtype=np.float32)
    return Prompt(tuple(map(int, ids)), spans, as_pixels(spec, pixels))


class Side:
    """One backend with a pool of its own, and the sequences on it."""

    def __init__(self, backend: Any, spec: LlavaSpec, itemsize: int, pages: int) -> None:
        self.backend, self.spec = backend, spec
        self.shape = spec.text.kv_shape(itemsize)
        self.pool = RowPool(pages, self.shape)
        self.lent: list[SequenceCache] = []

    def admit(self, prompt: Prompt, method: Method, formats: Formats | None = None) -> SequenceCache:
        shape = prompt_shape(len(prompt), prompt.spans)
        planned = kv_plan(method, formats or Formats(), self.shape, shape, STEPS * 2)
        return SequenceCache(self.pool, planned, len(prompt), prompt.spans, self.shape.layers)

    def start(self, prompt: Prompt, method: Method, formats: Formats | None = None) -> tuple[SequenceCache, Tensor]:
        cache = self.admit(prompt, method, formats)
        features = (
            None if prompt.pixel_values is None else run_whole(self.backend.begin_encode(prompt.pixel_values.pictures))
        )
        return cache, run_whole(self.backend.begin_prefill(prompt, features, cache))


class PrefixSide(Side):
    """A side on which requests that begin as its prefix's prompt are questions about that; others are plain."""

    def __init__(self, side: Side, head: Prompt, method: Method, formats: Formats) -> None:
        super().__init__(side.backend, side.spec, side.shape.itemsize, side.pool.pages)
        plan = kv_plan(method, formats, self.shape, prompt_shape(len(head), head.spans), 0)
        self.head, self.shared = head, SharedPrefixCache(self.pool, plan, len(head), head.spans, self.shape.layers)
        self.lent = [self.shared]
        features = run_whole(self.backend.begin_encode(head.pixel_values.pictures))
        run_whole(self.backend.begin_prefill(head, features, self.shared))

    def start(self, prompt: Prompt, method: Method, formats: Formats | None = None) -> tuple[SequenceCache, Tensor]:
        if prompt.token_ids[: len(self.head)] != self.head.token_ids:
            return super().start(prompt, method, formats)
        shape, shared = prompt_shape(len(prompt), prompt.spans), len(self.head)
        plan = plan_after(method, formats or Formats(), self.shape, shape, shared, STEPS * 2, None)
        cache = QuestionCache(self.shared, plan, len(prompt), prompt.spans)
        return cache, run_whole(self.backend.begin_prefill(prompt, None, cache))


def prefixes(
    sides: Sequence[Side], images: int, method: Method, formats: Formats
) -> tuple[list[PrefixSide], list[Prompt]]:
    """The same pictures prefilled on each side, and the prompts of three questions about them."""
    prompt = random_prompt(sides[0].spec, 5, images=images)
    end = prompt.spans[-1].start + prompt.spans[-1].length
    head = Prompt(prompt.token_ids[:end], prompt.spans, prompt.pixel_values)
    rng = np.random.default_rng(6)
    texts = [tuple(map(int, rng.integers(10, 300, n))) for n in (9, 1, 30)]
    questions = [Prompt(head.token_ids + text, head.spans, head.pixel_values) for text in texts]
    return [PrefixSide(side, head, method, formats) for side in sides], questions


PAGES = 4096


def both(directory: Path, module: Any = None, warps: int = 4) -> tuple[Side, Side, HostDevice]:
    spec = read_spec(directory)
    model = VisionLanguageModel(spec, load_weights(directory))
    oracle = TorchBackend(model, RowStore(PAGES, spec.text.kv_shape(model.dtype.itemsize), model.dtype))
    backend, device = backend_for(directory, PAGES, module, warps)
    sides = [Side(each, spec, model.dtype.itemsize, PAGES) for each in (oracle, backend)]
    return sides[0], sides[1], device


def membership(cache: SequenceCache) -> list[tuple[list[int], list[int], list[bool]]]:
    """Which tokens each layer holds, and in which tier, whatever rows they lie in."""
    return [(r.text_positions.tolist(), r.image_positions.tolist(), r.core.tolist()) for r in cache.rows.layers]


def run_both(oracle: Side, ours: Side, requests: Sequence[Request], tolerance: float, steps: int = STEPS) -> None:
    """Sequences join one after the other; every step's logits and rows are compared, the oracle's tokens go on."""
    held: list[list[SequenceCache]] = [[], []]
    tokens: list[int] = []
    waiting = list(requests)
    for turn in range(steps + len(waiting)):
        if waiting:
            request = waiting.pop(0)
            started = [side.start(*request) for side in (oracle, ours)]
            for caches, (cache, _) in zip(held, started, strict=True):
                caches.append(cache)
            close(started[1][1], started[0][1], tolerance)
            tokens.append(int(started[0][1].argmax()))
        expected, got = (
            side.backend.decode(tokens, caches).logits for side, caches in zip((oracle, ours), held, strict=True)
        )
        close(got, expected, tolerance)
        for theirs, own in zip(*held, strict=True):
            assert membership(own) == membership(theirs), turn
            assert [getattr(own, name) for name in COUNTS] == [getattr(theirs, name) for name in COUNTS]
        tokens = expected.argmax(-1).tolist()
        if turn == 4 and len(tokens) > 1:  # somebody leaves: the batch changes its bucket and its order
            for side, caches in zip((oracle, ours), held, strict=True):
                caches.pop(0).close()
                side.pool.check_integrity(cache.rows for cache in (*side.lent, *caches))
            tokens.pop(0)


COUNTS = ("rows_read", "rows_full", "bytes_read", "refreshes")


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.device.type == "cpu"
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert (got.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()
