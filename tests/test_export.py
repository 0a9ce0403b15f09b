"""The exported graphs, run by ONNX Runtime, against transformers and the torch backend: features, prompts, steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from avl_edge.backend import TorchBackend
from avl_edge.budget import kv_plan
from avl_edge.cache import Selected, SequenceCache, prompt_shape
from avl_edge.checkpoint import load_weights
from avl_edge.config import Formats
from avl_edge.cuda import FORMATS
from avl_edge.export import DECODER, VISION, Settings, export_model
from avl_edge.kernels import Part, attend_parts
from avl_edge.layout import UNIT, Format
from avl_edge.models import Llava
from avl_edge.policies import H2O, Avl, FastV, Full, Method
from avl_edge.pool import RowPool, RowStore
from avl_edge.pool.formats import decode, encode
from avl_edge.request import ImageSpan, Prompt
from avl_edge.spec import ModelSpec, read_spec
from tests.conftest import Checkpoints

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

Array = npt.NDArray[Any]
FAMILIES = ["llama-mha", "llama-gqa-full", "llama-bias", "llama-tied", "mistral-yarn", "mistral-wide", "qwen2-tied"]
PRUNE_AFTER = 1
TOLERANCE = 2e-4  # of logits of size one to ten, in float32: what the torch backend is allowed against transformers


class Exported:
    """A checkpoint as torch's model and as the two graphs."""

    def __init__(self, directory: Path, out: Path, precision: str, prune_after: int | None) -> None:
        self.directory = directory
        self.spec: ModelSpec = read_spec(directory)
        export_model(self.spec, directory, out, Settings(precision, prune_after))
        self._vision, self._decoder = (_session(out / name) for name in (VISION, DECODER))
        self.prunes = prune_after is not None
        self.dtype = {"float32": np.float32, "float16": np.float16}[precision]
        self.model = Llava(self.spec, load_weights(directory))

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
            "score_queries": np.array(queries, dtype=np.int32),
            **_pool_feeds(*np.zeros((2, 1, text.kv_heads, text.head_dim), dtype=self.dtype)),
        }
        return {**feeds, **self._all_survive(sum(lengths))}

    def _all_survive(self, tokens: int) -> dict[str, Array]:
        if not self.prunes:
            return {}
        return {"pinned": np.zeros(tokens, dtype=np.int32), "survivors": np.array([tokens], dtype=np.int64)}

    def step_feeds(
        self, token_ids: Sequence[int], positions: Sequence[int], recorded: Recorded, texts: Sequence[str], parts: int
    ) -> dict[str, Array]:
        """One step as the torch backend was seen to do it, in so many parts, the lists of all layers made equally long.
        ``texts``: the format of each sequence's new row."""
        text, batch = self.spec.text, len(token_ids)
        lists = [layer.lists(parts) for layer in recorded.layers]
        room = max(len(rows) for rows, _ in lists) + 3
        # What fills the room is a row that holds no numbers at all: nobody may read it.
        filler = len(recorded.keys) - 1
        feeds = {
            "token_ids": np.array(token_ids, dtype=np.int32),
            "features": np.zeros((1, text.hidden_size), dtype=self.dtype),
            "feature_rows": np.full(batch, -1, dtype=np.int32),
            "positions": np.array(positions, dtype=np.int32),
            "token_offsets": np.arange(batch + 1, dtype=np.int32),
            "slots": np.stack([layer.slots(texts, parts) for layer in recorded.layers]),
            "rows": np.stack([np.pad(rows, (0, room - len(rows)), constant_values=filler) for rows, _ in lists]),
            "row_offsets": np.stack([offsets for _, offsets in lists]),
            "score_queries": np.array([-1], dtype=np.int32),
            **_pool_feeds(recorded.keys.numpy(), recorded.values.numpy()),
        }
        return {**feeds, **self._all_survive(batch)}


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
            seen[layer] = (last, total, stored[0].places, stored[0].ids)
        return stored

    def prune_prompt(self, layer: int, last: Array, total: Array, *distances: Array) -> Array | None:
        survivors = super().prune_prompt(layer, last, total, *distances)
        if survivors is not None:
            self.survivors = survivors
        return survivors


@pytest.fixture(scope="module")
def export(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """``export(name)``: the graphs of a random checkpoint, made once; ``dtype`` is the checkpoint's."""
    made: dict[Any, Exported] = {}

    def make(name: str, prune_after: int | None = PRUNE_AFTER, dtype: torch.dtype = torch.float32) -> Exported:
        key = (name, prune_after, dtype)
        if key not in made:
            out = tmp_path_factory.mktemp("graphs")
            precision = str(dtype).removeprefix("torch.")
            made[key] = Exported(checkpoint(name, dtype=dtype), out, precision, prune_after)
        return made[key]

    return make


def prompt_of(exported: Exported, lengths: tuple[int, int], images: int, seed: int) -> Prompt:
    """Random text around random pictures; ``lengths`` before and after them, a token between two of them."""
    spec, random = exported.spec, np.random.default_rng(seed)
    side, per_image = spec.vision.image_size, spec.tokens_per_image
    spans = tuple(ImageSpan("", lengths[0] + index * (per_image + 1), per_image) for index in range(images))
    token_ids = random.integers(3, 300, sum(lengths) + images * (per_image + 1))
    for span in spans:
        token_ids[span.start : span.start + span.length] = spec.image_token_id
    pixels = random.standard_normal((images, 3, side, side), dtype=np.float32)
    return Prompt(tuple(map(int, token_ids)), spans, pixels if images else None)


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
        features = None if prompt.pixel_values is None else backend.encode_images(prompt.pixel_values)
        logits.append(backend.prefill(prompt, features, cache).numpy())
    return backend, recorded, store, caches, logits


@pytest.mark.parametrize("name", FAMILIES)
def test_features_equal_transformers(export: Callable[..., Exported], name: str) -> None:
    exported = export(name)
    model = LlavaForConditionalGeneration.from_pretrained(exported.directory).eval()
    side = exported.spec.vision.image_size
    for images in (1, 2, 5):
        pixels = np.random.default_rng(images).standard_normal((images, 3, side, side), dtype=np.float32)
        with torch.no_grad():
            expected = torch.stack(list(model.get_image_features(torch.from_numpy(pixels)).pooler_output))
        np.testing.assert_allclose(exported.encode(pixels), expected.numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_equal_transformers(export: Callable[..., Exported], name: str) -> None:
    """Two pictures, one, and none, side by side in one run: the logits of each prompt's last token."""
    exported = export(name)
    prompts = [prompt_of(exported, lengths, n, n) for lengths, n in (((5, 9), 2), ((1, 1), 1), ((30, 0), 0))]
    model = LlavaForConditionalGeneration.from_pretrained(exported.directory).eval()
    features = [exported.encode(prompt.pixel_values) for prompt in prompts if prompt.pixel_values is not None]
    logits = exported.decode(exported.prompt_feeds(prompts, features))["logits"]
    for prompt, ours in zip(prompts, logits, strict=True):
        pixels = None if prompt.pixel_values is None else torch.from_numpy(prompt.pixel_values)
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([prompt.token_ids]), pixel_values=pixels).logits[0, -1]
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "method",
    [Avl(prune_layer=PRUNE_AFTER, prefill_keep=60), FastV(layer=PRUNE_AFTER + 1, drop=30), H2O()],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("name", ["llama-gqa-full", "qwen2-tied"])
def test_prompt_gives_the_policy_what_it_asks_for(export: Callable[..., Exported], method: Method, name: str) -> None:
    """Scores, survivors, rows and logits of a prompt, as the torch backend has them under that method."""
    exported = export(name)
    prompt = prompt_of(exported, (6, 11), 2, 3)
    _, _, store, (cache,), (logits,) = start(exported, method, [prompt], 0)
    is_image = np.array(prompt.token_ids) == exported.spec.image_token_id
    queries = {
        "avl": np.flatnonzero(~is_image & (np.arange(len(prompt)) >= prompt.spans[0].start)),
        "fastv": np.array([-1]),
        "h2o": np.arange(len(prompt)),
    }[method.name]
    assert prompt.pixel_values is not None
    feeds = exported.prompt_feeds([prompt], [exported.encode(prompt.pixel_values)], queries)
    survivors = getattr(cache, "survivors", np.arange(len(prompt)))
    feeds |= {"pinned": (~is_image).astype(np.int32), "survivors": np.array([len(survivors)])}
    out = exported.decode(feeds)
    assert out["kept"].tolist() == survivors.tolist()
    assert (len(survivors) < len(prompt)) == (method.name != "h2o")
    np.testing.assert_allclose(out["logits"][0], logits, rtol=0, atol=TOLERANCE)
    for layer, (last, total, chosen, ids) in cache.seen.items():
        np.testing.assert_allclose(out[f"key.{layer}"][chosen], store.keys[ids], rtol=0, atol=2e-5)
        np.testing.assert_allclose(out[f"value.{layer}"][chosen], store.values[ids], rtol=0, atol=2e-5)
        if method.name == "fastv":
            assert not out[f"token_scores.{layer}"][1].any()
        if cache.prompt_queries(layer) is not None:
            np.testing.assert_allclose(out[f"token_scores.{layer}"][0], last, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(out[f"token_scores.{layer}"][1], total, rtol=1e-3, atol=1e-5)


NAMES = st.sampled_from(list(FORMATS))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["llama-mha", "llama-bias", "mistral-yarn", "qwen2-tied"]),
    prune_after=st.sampled_from([None, PRUNE_AFTER]),
    method=st.sampled_from([Full(), Avl(), Avl(prune_layer=0, secondary=30, core=10, text_keep=40, text_floor=1)]),
    prompts=st.lists(
        st.tuples(
            st.integers(1, 40),
            st.integers(1, 40),
            st.integers(0, 2),
            st.one_of(st.just(Formats()), st.builds(Formats, NAMES, NAMES, NAMES)),
        ),
        min_size=1,
        max_size=5,
    ),
    more=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_whole_steps_equal_the_torch_backend(
    export: Callable[..., Exported],
    name: str,
    prune_after: int | None,
    method: Method,
    prompts: list[tuple[int, int, int, Formats]],
    more: int,
    seed: int,
) -> None:
    """Batches of sequences of all lengths, each with rows in formats of its own; parts that nobody uses too."""
    formats = [each for *_, each in prompts]
    used = max(list(FORMATS).index(own) for each in formats for own in each.by_tier().values())
    compared = whole_steps(export(name, prune_after), method, prompts, min(used + more + 1, len(FORMATS)), seed)
    event(f"{used + 1} formats, {compared} of {STEPS} steps rounded alike")


@pytest.mark.parametrize("name", list(FORMATS))
def test_steps_over_packed_rows_are_rounded_alike_as_a_rule(export: Callable[..., Exported], name: str) -> None:
    """So that what is said of steps is said of packed ones too."""
    prompts = [(9, 4, 1, Formats(name, name, name)), (3, 30, 0, Formats(name, name, name))]
    compared = whole_steps(export("llama-mha", None), Full(), prompts, len(FORMATS), seed=1)
    assert compared >= STEPS - 1


STEPS = 4


def whole_steps(
    exported: Exported, method: Method, prompts: Sequence[tuple[int, int, int, Formats]], parts: int, seed: int
) -> int:
    """Logits, scores of every row that was read, and the new rows, of :data:`STEPS` steps, each of which begins with
    the torch backend's rows; how many of them were compared to their end.

    Two programs in float32 part in the last bits, and where a new row falls between two numbers of its format, such a
    bit decides. What follows from another number is not compared.
    """
    laid_out = [prompt_of(exported, (before, after), n, seed) for before, after, n, _ in prompts]
    random, compared = np.random.default_rng(seed), 0
    backend, recorded, _, caches, _ = start(exported, method, laid_out, STEPS, [formats for *_, formats in prompts])
    for _ in range(STEPS):
        token_ids = random.integers(3, 300, len(caches)).tolist()
        recorded.begin()
        positions = [cache.length + cache.step for cache in caches]
        expected = backend.decode(token_ids, caches).numpy()
        texts = [cache.formats.text for cache in caches]
        out = exported.decode(exported.step_feeds(token_ids, positions, recorded, texts, parts))
        for number, layer in enumerate(recorded.layers):
            alike = [_rounded_alike(exported, out, number, layer, b, texts[b]) for b in range(len(texts))]
            if not all(alike):
                break
            scores = layer.scores(parts)
            np.testing.assert_allclose(out["row_scores"][number, : len(scores)], scores, rtol=1e-3, atol=1e-6)
        else:
            np.testing.assert_allclose(out["logits"], expected, rtol=0, atol=TOLERANCE)
            compared += 1
    return compared


def _rounded_alike(exported: Exported, out: dict[str, Array], number: int, layer: Layer, b: int, name: str) -> bool:
    """The new row of a sequence is the torch backend's; of a packed one, whether it has the same record."""
    text, same = exported.spec.text, True
    rows, offsets, _ = layer.read[name]
    row = int(rows[offsets[b + 1] - 1])
    for kind, arena in (("key", layer.keys), ("value", layer.values)):
        own = torch.from_numpy(out[f"{kind}.{number}"][b])
        if name == "exact":
            np.testing.assert_allclose(own, arena[row], rtol=0, atol=2e-5)
            continue
        record = encode(Format(name), own[None])
        stored = arena.view(torch.uint8).flatten()[UNIT * row :][: record.shape[1]][None]
        ours, theirs = (decode(Format(name), each, text.kv_heads, text.head_dim) for each in (record, stored))
        step = float(own.abs().max()) / (127 if name == "int8" else 7)
        assert float((ours - theirs).abs().max()) <= 1.01 * step, "further apart than a number from the next"
        same &= torch.equal(record, stored)
    return same


def test_half_precision_is_as_close_to_float64_as_torch(export: Callable[..., Exported]) -> None:
    """Two programs in float16 part in the last bits, so errors are compared: ours, and transformers' own."""
    exported = export("llama-gqa-full", dtype=torch.float16)
    prompt = prompt_of(exported, (5, 9), 2, 1)
    assert prompt.pixel_values is not None
    pixels = torch.from_numpy(prompt.pixel_values)
    features = exported.encode(prompt.pixel_values)
    logits = exported.decode(exported.prompt_feeds([prompt], [features]))["logits"][0]
    runs = {}
    for dtype in (torch.float64, torch.float16):
        model = LlavaForConditionalGeneration.from_pretrained(exported.directory, dtype=dtype).eval()
        with torch.no_grad():
            run = model(input_ids=torch.tensor([prompt.token_ids]), pixel_values=pixels.to(dtype))
        runs[dtype] = run.logits[0, -1].double().numpy()
    exact = runs[torch.float64]
    theirs = np.sqrt(np.mean((runs[torch.float16] - exact) ** 2))
    assert np.sqrt(np.mean((logits - exact) ** 2)) <= 1.5 * theirs
