"""A checkpoint as graphs, run by ONNX Runtime, beside the torch backend, whose steps they are asked to repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from avl_edge.attention.cuda import FORMATS
from avl_edge.attention.kernels import Part, attend_parts
from avl_edge.backends.base import run_whole
from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.config import Formats
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.cache import SequenceCache, prompt_shape
from avl_edge.kv.methods import Method
from avl_edge.kv.pool import RowPool
from avl_edge.kv.selection import Selected
from avl_edge.kv.store import RowStore
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec
from avl_edge.model.families.llava import LlavaSpec
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.package.export import DECODER, VISION, Settings, export_model
from avl_edge.request import ImageSpan, Prompt
from tests.conftest import Checkpoints
from tests.equipment.pixels import as_pixels

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

Array = npt.NDArray[Any]
PRUNE_AFTER = 1
TOLERANCE = 2e-4  # of logits of size one to ten, in float32: what the torch backend is allowed against transformers


class Exported:
    """A checkpoint as torch's model and as the two graphs."""

    def __init__(self, directory: Path, out: Path, precision: str, prune_after: int | None) -> None:
        self.directory = directory
        self.spec: LlavaSpec = read_spec(directory)
        export_model(self.spec, directory, out, Settings(precision, prune_after))
        self._vision, self._decoder = (_session(out / name) for name in (VISION, DECODER))
        self.prunes = prune_after is not None
        self.dtype = {"float32": np.float32, "float16": np.float16}[precision]
        self.model = VisionLanguageModel(self.spec, load_weights(directory))

    def encode(self, pixels: Array) -> Array:
        features: Array = self._vision.run(None, {"pixels": pixels})[0]
        return features

    def decode(self, feeds: dict[str, Array]) -> dict[str, Array]:
        names = [output.name for output in self._decoder.get_outputs()]
        return dict(zip(names, self._decoder.run(names, feeds), strict=True))

    def prompt_feeds(
        self, prompts: Sequence[Prompt], features: Sequence[Array], queries: Sequence[int] = (-1,)
    ) -> dict[str, Array]:
        """Several prompts, side by side, with an empty pool; nobody has a slot."""
        text, lengths = self.spec.text, [len(prompt) for prompt in prompts]
        feature_rows, taken = [], 0
        for prompt in prompts:
            rows = np.full(len(prompt), -1, dtype=np.int32)
            for span in prompt.spans:
                rows[span.start : span.start + span.length] = taken + np.arange(span.length)
                taken += span.length
            feature_rows.append(rows)
        flat = [part.reshape(-1, text.hidden_size) for part in features]
        feeds = {
            "token_ids": np.concatenate([np.array(prompt.token_ids) for prompt in prompts]).astype(np.int32),
            "features": np.concatenate([*flat, np.zeros((1, text.hidden_size))]).astype(self.dtype),
            "feature_rows": np.concatenate(feature_rows),
            "positions": np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
            "token_offsets": np.cumsum([0, *lengths], dtype=np.int32),
            "slots": np.full((text.layers, sum(lengths)), -1, dtype=np.int32),
            "rows": np.zeros((text.layers, 0), dtype=np.int32),
            "row_offsets": np.zeros((text.layers, len(prompts) + 1), dtype=np.int32),
            "smoothing": np.full((text.layers, sum(lengths)), -1, dtype=np.int32),
            "score_queries": np.array(queries, dtype=np.int32),
            **_pool_feeds(*np.zeros((2, 1, text.kv_heads, text.head_dim), dtype=self.dtype)),
        }
        return {**feeds, **self._all_survive(sum(lengths))}

    def _all_survive(self, tokens: int) -> dict[str, Array]:
        if not self.prunes:
            return {}
        return {"pinned": np.zeros(tokens, dtype=np.int32), "survivors": np.array([tokens], dtype=np.int64)}

    def step_feeds(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        slots: Array,
        rows: Array,
        offsets: Array,
        pool: tuple[Array, Array],
        smoothing: Array | None = None,
    ) -> dict[str, Array]:
        """A step with the tables of all layers; without ``smoothing`` keys are as the model makes them."""
        batch, text = len(token_ids), self.spec.text
        if smoothing is None:
            smoothing = np.full((text.layers, batch), -1, dtype=np.int32)
        feeds = {
            "token_ids": np.array(token_ids, dtype=np.int32),
            "features": np.zeros((1, text.hidden_size), dtype=self.dtype),
            "feature_rows": np.full(batch, -1, dtype=np.int32),
            "positions": np.array(positions, dtype=np.int32),
            "token_offsets": np.arange(batch + 1, dtype=np.int32),
            "slots": slots,
            "rows": rows,
            "row_offsets": offsets,
            "smoothing": smoothing,
            "score_queries": np.array([-1], dtype=np.int32),
            **_pool_feeds(*pool),
        }
        return {**feeds, **self._all_survive(batch)}

    def repeat(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        recorded: Recorded,
        caches: Sequence[SequenceCache],
        parts: int,
    ) -> dict[str, Array]:
        """One step as the torch backend was seen to do it for ``caches``, in so many parts, the lists of all layers
        made equally long."""
        texts = [cache.formats.text for cache in caches]
        smoothing = np.stack([cache.rows.smoothing for cache in caches], axis=1)
        lists = [layer.lists(parts) for layer in recorded.layers]
        room = max(len(rows) for rows, _ in lists) + 3
        # What fills the room is a row that holds no numbers at all: nobody may read it.
        filler = len(recorded.keys) - 1
        slots = np.stack([layer.slots(texts, parts) for layer in recorded.layers])
        rows = np.stack([np.pad(rows, (0, room - len(rows)), constant_values=filler) for rows, _ in lists])
        offsets = np.stack([offsets for _, offsets in lists])
        pool = recorded.keys.numpy(), recorded.values.numpy()
        return self.step_feeds(token_ids, positions, slots, rows, offsets, pool, smoothing)


def _pool_feeds(keys: Array, values: Array) -> dict[str, Array]:
    words = {
        f"pool_{name}_words": pool.view(np.int32).reshape(-1, 4) for name, pool in (("key", keys), ("value", values))
    }
    return {"pool_keys": keys, "pool_values": values, **words}


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass
class Layer:
    """What a layer of a step was asked to read, by format: ids, offsets and the scores that they received; and the
    pool as it read it, with its new rows."""

    read: dict[str, tuple[Array, Array, Array]]
    keys: Tensor
    values: Tensor

    def _of(self, parts: int) -> list[tuple[Array, Array, Array]]:
        batch = len(next(iter(self.read.values()))[1]) - 1
        nothing = np.zeros(0, np.int32), np.zeros(batch + 1, np.int32), np.zeros(0, np.float32)
        return [self.read.get(name, nothing) for name in list(FORMATS)[:parts]]

    def lists(self, parts: int) -> tuple[Array, Array]:
        """All ids, and the offsets of all lists."""
        rows, offsets, _ = zip(*self._of(parts), strict=True)
        lengths = np.concatenate([np.diff(each) for each in offsets])
        return np.concatenate(rows), np.cumsum([0, *lengths], dtype=np.int32)

    def slots(self, texts: Sequence[str], parts: int) -> Array:
        """A new row is the last of its sequence's list in its format."""
        slots = np.full((parts, len(texts)), -1, dtype=np.int32)
        for b, name in enumerate(texts):
            rows, offsets, _ = self.read[name]
            slots[list(FORMATS).index(name), b] = rows[offsets[b + 1] - 1]
        return slots.reshape(-1)

    def scores(self, parts: int) -> Array:
        return np.concatenate([scores for _, _, scores in self._of(parts)])


class Recorded:
    """Stands in for `attend_parts`: what each layer of a step was asked to read, and the scores that it gave."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self.begin()

    def begin(self) -> None:
        """Before a step: the pool as the step finds it."""
        self.keys, self.values = self._store.keys.clone(), self._store.values.clone()
        self.layers: list[Layer] = []

    def __call__(
        self, query: Tensor, parts: Sequence[Part], kv_heads: int, scale: float, *, scores: bool
    ) -> tuple[Tensor, Sequence[Tensor] | None]:
        out, weights = attend_parts(query, parts, kv_heads, scale, scores=True)
        assert weights is not None
        read = {
            part.format: (part.rows.numpy().copy(), part.offsets.numpy().copy(), own.numpy().copy())
            for part, own in zip(parts, weights, strict=True)
        }
        self.layers.append(Layer(read, self._store.keys.clone(), self._store.values.clone()))
        return out, weights if scores else None


class WatchedCache(SequenceCache):
    """Remembers what prefill gave each layer and what was chosen."""

    def store_prompt(self, layer: int, last: Array, total: Array, *distances: Array) -> list[Selected]:
        seen: dict[int, Any] = self.__dict__.setdefault("seen", {})
        stored = super().store_prompt(layer, last, total, *distances)
        if len(stored) == 1:
            seen[layer] = (last, total, stored[0].order, stored[0].ids)
        return stored

    def prune_prompt(self, layer: int, last: Array, total: Array, *distances: Array) -> Array | None:
        survivors = super().prune_prompt(layer, last, total, *distances)
        if survivors is not None:
            self.survivors = survivors
        return survivors


class Exports:
    """``exports(name)``: the graphs of a random checkpoint, made once; ``dtype`` is the checkpoint's."""

    def __init__(self, checkpoint: Checkpoints, paths: pytest.TempPathFactory) -> None:
        self._checkpoint, self._paths = checkpoint, paths
        self._made: dict[Any, Exported] = {}

    def __call__(
        self, name: str, prune_after: int | None = PRUNE_AFTER, dtype: torch.dtype = torch.float32
    ) -> Exported:
        key = (name, prune_after, dtype)
        if key not in self._made:
            out, precision = self._paths.mktemp("graphs"), str(dtype).removeprefix("torch.")
            self._made[key] = Exported(self._checkpoint(name, dtype=dtype), out, precision, prune_after)
        return self._made[key]


def prompt_of(exported: Exported, lengths: tuple[int, int], images: int, seed: int) -> Prompt:
    """Random text around random pictures; ``lengths`` before and after them, a token between two of them."""
    spec, random = exported.spec, np.random.default_rng(seed)
    side, per_image = spec.vision.image_size, spec.tokens_per_image
    spans = tuple(ImageSpan("", lengths[0] + index * (per_image + 1), per_image) for index in range(images))
    token_ids = random.integers(3, 300, sum(lengths) + images * (per_image + 1))
    for span in spans:
        token_ids[span.start : span.start + span.length] = spec.image_token_id
    pixels = random.standard_normal((images, 3, side, side), dtype=np.float32)
    return Prompt(tuple(map(int, token_ids)), spans, as_pixels(spec, pixels))


def start(
    exported: Exported, method: Method, prompts: Sequence[Prompt], steps: int, formats: Sequence[Formats] = ()
) -> tuple[Any, ...]:
    """The torch backend after the prompts: itself, its recorder, the caches and the prompts' logits."""
    text = exported.spec.text
    shape = text.kv_shape(4)
    plans = [
        kv_plan(method, own, shape, prompt_shape(len(prompt), prompt.spans), steps + 1)
        for prompt, own in zip(prompts, formats or [Formats()] * len(prompts), strict=True)
    ]
    pool = RowPool(sum(plan.pages for plan in plans) + 1, shape)
    store = RowStore(pool.pages, shape, exported.model.dtype)
    store.keys.fill_(float("nan"))
    store.values.fill_(float("nan"))
    recorded = Recorded(store)
    backend = TorchBackend(exported.model, store, attend=recorded)
    caches = [
        WatchedCache(pool, plan, len(prompt), prompt.spans, text.layers)
        for plan, prompt in zip(plans, prompts, strict=True)
    ]
    logits = []
    for prompt, cache in zip(prompts, caches, strict=True):
        features = (
            None if prompt.pixel_values is None else run_whole(backend.begin_encode(prompt.pixel_values.pictures))
        )
        logits.append(run_whole(backend.begin_prefill(prompt, features, cache)).numpy())
    return backend, recorded, store, caches, logits
