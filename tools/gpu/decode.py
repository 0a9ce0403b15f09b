"""The whole path: the GPU's prompt and decode steps against the CPU's, and recorded steps against launched ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avl_edge.backends.base import Backend
from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.backends.cuda import load_model
from avl_edge.backends.decode_loop import DecodeLoop
from avl_edge.config import Formats
from avl_edge.kv.budget import KvPlan, kv_plan, plan_after
from avl_edge.kv.cache import prompt_shape
from avl_edge.kv.methods import H2O, AttentionPack, Avl, Coarse, Full, Method, Streaming
from avl_edge.kv.shared_prefix import QuestionCache, SharedPrefixCache
from avl_edge.kv.store import RowStore
from avl_edge.model.checkpoint import Weights
from avl_edge.model.families.llava import LlavaSpec
from avl_edge.model.spec import ModelSpec
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.request import ImageSpan, Pixels, PixelValues, Prompt
from tools.gpu.dut import DeviceUnderTest, backend, require, row_store

STEPS = 12
Request = tuple[Method, Formats]
PACKED = Formats("int8", "int8", "int8")
LOW_RANK = Formats("exact", "lowrank:16", "lowrank:16@4")
REQUESTS: tuple[Request, ...] = (
    (Full(), Formats()),
    (Avl(), Formats()),
    (H2O(), Formats()),
    (Streaming(), Formats()),
    (Full(), PACKED),
    (Avl(), Formats("exact", "int8", "int4")),
    (Coarse(), Formats("exact", "int4", "int4")),
    (Coarse(core=30), PACKED),
    (AttentionPack(), LOW_RANK),
    (Avl(), Formats("exact", "exact", "lowrank:16+int8")),
)
"""Of which the exact ones are decoded together, and then all of them."""


@dataclass(frozen=True)
class Model:
    """A checkpoint: what it is, and its weights on the CPU."""

    spec: ModelSpec
    weights: Weights


class AsHalf(Weights):
    """The same weights in float16, whose finer rounding shows smaller errors."""

    def __init__(self, weights: Weights) -> None:
        super().__init__({})
        self._weights = weights
        self.dtype = torch.float16

    def take(self, name: str, *shape: int) -> Tensor:
        return self._weights.take(name, *shape).to(self.dtype)

    def has(self, layer: str) -> bool:
        return self._weights.has(layer)

    def deny(self, name: str) -> None:
        self._weights.deny(name)


def random_prompt(spec: ModelSpec, seed: int) -> Prompt:
    """Text, one picture of noise, text."""
    assert isinstance(spec, LlavaSpec)
    rng = np.random.default_rng(seed)
    before, after, image = 12 + seed, 20, spec.tokens_per_image
    ids = rng.integers(10, spec.text.vocab_size // 2, before + image + after)
    side = spec.vision.image_size
    pixels = PixelValues(rng.standard_normal((3, side, side), dtype=np.float32), spec.picture(side, side))
    return Prompt(tuple(map(int, ids)), (ImageSpan(str(seed), before, image),), Pixels((pixels,)))


class Sequences(DecodeLoop):
    """A few requests on one backend, decoded together; ``first`` are the logits of their prompts."""

    def __init__(self, of: Backend, model: Model, requests: Sequence[Request]) -> None:
        super().__init__(of)
        self.first: list[Tensor] = []
        for seed, (method, formats) in enumerate(requests):
            prompt = random_prompt(model.spec, seed)
            planned = kv_plan(method, formats, self.pool.shape, prompt_shape(len(prompt), prompt.spans), STEPS)
            self.first.append(self.prefill(prompt, self.encode(prompt), planned))

    def membership(self) -> list[list[tuple[list[int], list[int]]]]:
        """Which tokens each layer of each sequence holds; the image's core."""
        return [
            [(each.text_positions.tolist(), each.image_positions[each.core].tolist()) for each in cache.rows.layers]
            for cache in self.caches
        ]


class Questions(Sequences):
    """Questions about one shared prefix, of which each request is one; the first's formats are the prefix's."""

    def __init__(self, of: Backend, model: Model, requests: Sequence[Request]) -> None:
        super().__init__(of, model, ())
        shape, whole = self.pool.shape, random_prompt(model.spec, 0)
        end = whole.spans[0].start + whole.spans[0].length
        head = Prompt(whole.token_ids[:end], whole.spans, whole.pixel_values)
        plan: KvPlan[Method] = kv_plan(Full(), requests[0][1], shape, prompt_shape(end, head.spans), 0)
        shared = SharedPrefixCache(self.pool, plan, end, head.spans, shape.layers)
        self.run(head, self.encode(head), shared)
        for seed, (method, formats) in enumerate(requests):
            text = random_prompt(model.spec, seed).token_ids[5 * seed - 20 :]
            prompt = Prompt(head.token_ids + text, head.spans, None)
            planned = plan_after(method, formats, shape, prompt_shape(len(prompt), head.spans), end, STEPS)
            cache = QuestionCache(shared, planned, len(prompt), head.spans)
            self.first.append(self.run(prompt, None, cache))
            self.caches.append(cache)


def pages_for(model: Model, sequences: int) -> int:
    """Pages of a pool that holds that many whole contexts of the prompts used here."""
    longest = len(random_prompt(model.spec, sequences)) + STEPS
    return sequences * model.spec.text.layers * (longest // 16 + 2)


def check_against_cpu(dut: DeviceUnderTest, model: Model, sequences: int = 3) -> dict[str, float]:
    """Full attention, whose rows no rounding can change: logits of the prompt and of each step, the CPU's tokens going
    on in both."""
    limit = 4 * torch.finfo(model.weights.dtype).eps  # of two programs that round to this dtype after each operator
    return {"logits": _against_cpu(dut, model, [(Full(), Formats())] * sequences, limit)}


def check_packed_against_cpu(dut: DeviceUnderTest, model: Model) -> dict[str, float]:
    """The same over int8 rows, and over int8 image rows alone: values that round to the next number there are half a
    step of the format away, as those of the format itself are."""
    requests = [(Full(), PACKED), (Full(), Formats("exact", "int8", "int8"))]
    return {"logits": _against_cpu(dut, model, requests, 4 * torch.finfo(model.weights.dtype).eps + 1 / 254)}


def check_sessions_against_cpu(dut: DeviceUnderTest, model: Model) -> dict[str, float]:
    """The same for questions about a picture, over its exact rows and over packed ones, which their prompts attend as
    they are read back."""
    limit, found = 4 * torch.finfo(model.weights.dtype).eps, {}
    for name, formats, more in (("exact", Formats(), 0.0), ("packed", Formats("exact", "int8", "int8"), 1 / 254)):
        requests: list[Request] = [(Full(), formats)] * 3
        found[f"logits_{name}"] = _against_cpu(dut, model, requests, limit + more, kind=Questions)
    return found


def check_low_rank_against_cpu(dut: DeviceUnderTest, model: Model) -> dict[str, float]:
    """The same over coefficients, all that are stored and the first of them, beside exact rows. The prompt's rows are
    the CPU's on both sides: a basis turns with the last bits of what it is fitted to."""
    requests: list[Request] = [
        (AttentionPack(core=100), LOW_RANK),
        (AttentionPack(core=0), LOW_RANK),
        (Full(), Formats()),
    ]
    limit = 4 * torch.finfo(model.weights.dtype).eps
    return {"logits": _against_cpu(dut, model, requests, limit, of_cpu=True)}


def _against_cpu(
    dut: DeviceUnderTest,
    model: Model,
    requests: Sequence[Request],
    limit: float,
    *,
    kind: type[Sequences] = Sequences,
    of_cpu: bool = False,
) -> float:
    """The largest distance of logits; with ``of_cpu`` the steps go over the rows that the CPU stored."""
    dtype, pages = model.weights.dtype, pages_for(model, len(requests))
    on_device = load_model(model.spec, model.weights, dut.accelerator.device)
    stores = RowStore(pages, model.spec.text.kv_shape(dtype.itemsize), dtype), row_store(dut, on_device, pages)
    backends = (
        TorchBackend(VisionLanguageModel(model.spec, model.weights), stores[0]),
        backend(dut, on_device, stores[1]),
    )
    expected, got = (kind(each, model, requests) for each in backends)
    if of_cpu:
        stores[1].keys.copy_(stores[0].keys)
        stores[1].values.copy_(stores[0].values)
    worst = max(_distance(a, b) for a, b in zip(got.first, expected.first, strict=True))
    tokens = [int(logits.argmax()) for logits in expected.first]
    for _ in range(STEPS):
        theirs = expected.decode(tokens)
        worst = max(worst, _distance(got.decode(tokens), theirs))
        tokens = theirs.argmax(-1).tolist()
    require(worst <= limit, f"logits are {worst:.2e} of their size from the CPU's, more than {limit:.2e}")
    return worst


def check_graphs(dut: DeviceUnderTest, model: Model) -> dict[str, float]:
    """Recorded steps give what launched ones give: logits, tokens and rows, for methods that change their rows and
    formats, choose rows within a step, and read low-rank ones at every step or at every few."""
    exact = [request for request in REQUESTS if request[1].all_exact]
    return {"logits": max(_graphs(dut, model, requests) for requests in (exact, REQUESTS))}


def _graphs(dut: DeviceUnderTest, model: Model, requests: Sequence[Request]) -> float:
    dtype = model.weights.dtype
    pages = pages_for(model, len(requests))
    on_device = load_model(model.spec, model.weights, dut.accelerator.device)
    recorded, launched = (
        Sequences(backend(dut, on_device, row_store(dut, on_device, pages), eager=eager), model, requests)
        for eager in (False, True)
    )
    tokens, worst = [int(logits.argmax()) for logits in launched.first], 0.0
    for number in range(STEPS):
        theirs, ours = launched.decode(tokens), recorded.decode(tokens)
        worst = max(worst, _distance(ours, theirs))
        require(recorded.membership() == launched.membership(), f"the rows differ after step {number + 1}")
        tokens = theirs.argmax(-1).tolist()
    require(worst <= torch.finfo(dtype).eps, f"logits of recorded and launched steps are {worst:.2e} apart")
    return worst


def _distance(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a part of that of the logits; infinite where one is not a number."""
    difference = float((got.double() - expected.double()).norm() / expected.double().norm())
    return difference if difference == difference else float("inf")
