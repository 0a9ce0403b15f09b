"""Low-rank rows on the GPU backend against the oracle: alone, and in one step with rows that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from avl_edge.budget import kv_plan
from avl_edge.cache import SequenceCache, prompt_shape
from avl_edge.checkpoint import load_weights
from avl_edge.config import Formats
from avl_edge.cuda import Kernels, KernelShape, Pool
from avl_edge.cuda_backend.low_rank import LowRankReads
from avl_edge.cuda_backend.model import load_model
from avl_edge.cuda_backend.step import DecodeStep
from avl_edge.cuda_backend.tables import Bucket
from avl_edge.policies import H2O, AttentionPack, Avl, Coarse, Full, Method
from avl_edge.pool import RowPool, RowStore
from avl_edge.spec import read_spec
from avl_edge.stored import StoredRows
from tests.conftest import Checkpoints
from tests.cuda_sides import (
    STEP_OF,
    Elsewhere,
    Nothing,
    OneDevice,
    Request,
    Side,
    UncheckedRope,
    both,
    random_prompt,
    run_both,
)

PACK = Formats("exact", "lowrank:8", "lowrank:8@2")
SECONDARY = Formats("exact", "exact", "lowrank:8")
KINDS: dict[str, tuple[Method, Formats]] = {
    "attentionpack": (AttentionPack(), PACK),
    "attentionpack-decay": (AttentionPack(core=50, decay=20), Formats("exact", "lowrank:12@3", "lowrank:12@3")),
    "coefficients-packed": (AttentionPack(), Formats("exact", "lowrank:8+int8", "lowrank:8@4+int8")),
    "text-packed": (AttentionPack(), Formats("int8", "lowrank:8", "lowrank:8@2")),
    "full": (Full(), Formats("exact", "lowrank:8", "lowrank:8")),
    "avl": (Avl(secondary=80, core=30, refresh=2, text_floor=4), SECONDARY),
    "avl-packed": (Avl(secondary=80, core=30, refresh=2, text_floor=4), Formats("int8", "int8", "lowrank:8@4")),
    "avl-mean": (Avl(prompt_mean=1, refresh=3), Formats("exact", "lowrank:8", "lowrank:8@2")),
    "h2o": (H2O(), Formats("exact", "lowrank:8", "lowrank:8")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-gqa-full", "mistral-yarn"])
def test_low_rank_rows_equal_the_oracles(checkpoint: Checkpoints, name: str, kind: str) -> None:
    """One picture, two, none: logits, rows, tiers and counts."""
    oracle, ours, device = both(checkpoint(name))
    prompts = [random_prompt(oracle.spec, seed, images=images)[0] for seed, images in enumerate((1, 2, 0))]
    method, formats = KINDS[kind]
    run_both(oracle, ours, [(prompt, method, formats) for prompt in prompts], STEP_OF[formats.text])
    steps = 8 + len(prompts)
    assert device.log.count("synchronize") == steps, "a step waits once"


def test_one_step_serves_low_rank_rows_and_all_others(checkpoint: Checkpoints) -> None:
    oracle, ours, device = both(checkpoint("llama-mha"))
    kinds: list[tuple[Method, Formats]] = [
        (Coarse(core=30), Formats("exact", "int8", "int8")),
        (AttentionPack(), PACK),
        (Avl(refresh=2, secondary=80, core=30), Formats("exact", "int8", "int4")),
        (Full(), Formats()),
        (H2O(), Formats("int4", "int4", "int4")),
        (Avl(refresh=3, secondary=80, core=30), SECONDARY),
    ]
    requests: list[Request] = [(random_prompt(oracle.spec, seed)[0], *each) for seed, each in enumerate(kinds)]
    run_both(oracle, ours, requests, STEP_OF["int4"])
    assert device.log.count("synchronize") == 8 + len(kinds), "a step waits once"


def test_what_is_recorded_and_what_is_not(checkpoint: Checkpoints) -> None:
    """A step in which somebody reads low-rank rows is launched, once; any other is replayed, also for who has some."""
    _, ours, device = both(checkpoint("llama-mha"))
    pack, _ = ours.start(random_prompt(ours.spec, 0)[0], AttentionPack(), PACK)
    avl, _ = ours.start(random_prompt(ours.spec, 1)[0], Avl(refresh=3, text_keep=100), SECONDARY)
    exact, _ = ours.start(random_prompt(ours.spec, 2)[0], Full())
    launched = ours.backend._kernels._modules["exact"].launched
    layers, step = ours.spec.text.layers, ["avl_append", "avl_attend", "avl_merge"]
    for caches, reads_low_rank in (
        ([exact, pack], True),
        ([exact, avl], False),
        ([exact, avl], False),
        ([exact, avl], True),
        ([exact], False),
        ([pack], True),
    ):
        device.log.clear(), launched.clear()
        ours.backend.decode([5] * len(caches), caches)
        assert ("replay" in device.log) is not reads_low_rank
        assert device.log[-1] == "synchronize"
        if reads_low_rank:
            assert launched == step * layers, "the kernels run once, with the new rows of all"
            tables = next(reversed(ours.backend._steps.values())).tables
            listed = np.diff(tables.offsets)[:, : len(caches)]
            assert (listed > 0).tolist() == [[each is exact for each in caches]] * layers, "and read those of others"


def test_neighbours_are_attended_by_the_kernels_as_without_low_rank_rows(checkpoint: Checkpoints) -> None:
    """The same logits, bit for bit, where the batch is as large."""
    directory, logits = checkpoint("llama-gqa-full"), []
    for other in ((AttentionPack(), PACK), (Full(), Formats())):
        _, ours, _ = both(directory)
        exact, _ = ours.start(random_prompt(ours.spec, 0)[0], Full())
        neighbour, _ = ours.start(random_prompt(ours.spec, 1)[0], *other)
        logits.append([ours.backend.decode([5, 6], [exact, neighbour])[0] for _ in range(4)])
    assert all(torch.equal(got, expected) for got, expected in zip(*logits, strict=True))


def test_greedy_tokens_are_those_of_the_logits(checkpoint: Checkpoints) -> None:
    sides = [both(checkpoint("llama-gqa-full"))[1] for _ in range(2)]
    kinds = ((AttentionPack(), PACK), (Full(), Formats()), (AttentionPack(), PACK))
    held = [[side.start(random_prompt(side.spec, n)[0], *each)[0] for n, each in enumerate(kinds)] for side in sides]
    tokens = [5, 6, 7]
    for _ in range(6):
        expected = sides[0].backend.decode(tokens, held[0]).argmax(-1).tolist()
        tokens = sides[1].backend.decode_greedy(tokens, held[1])
        assert tokens == expected


# No operator over two devices


class Places:
    """A model, rows and caches on a device without values; what a prompt would store is chosen by random scores."""

    def __init__(self, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("avl_edge.models.decoder.Rope", UncheckedRope)
        monkeypatch.setattr("avl_edge.cuda_backend.step.address", lambda _: 16)
        self.spec, self.device = read_spec(checkpoint("llama3-rope")), Elsewhere()
        with torch.inference_mode():
            self.model = load_model(self.spec, load_weights(checkpoint("llama3-rope")), self.device.device)
        self.shape = self.spec.text.kv_shape(self.model.dtype.itemsize)
        self.pool = RowPool(1024, self.shape)
        store = RowStore(1024, self.shape, self.model.dtype, "meta")
        self.rows = StoredRows(store, self.model.decoder.angles)

    def new_rows(self, count: int) -> tuple[Tensor, Tensor]:
        size = (count, self.shape.kv_heads, self.shape.head_dim)
        return torch.empty(size, dtype=self.model.dtype, device="meta"), torch.empty(
            size, dtype=self.model.dtype, device="meta"
        )

    def start(self, method: Method, formats: Formats, seed: int) -> SequenceCache:
        prompt, _ = random_prompt(self.spec, seed)
        plan = kv_plan(method, formats, self.shape, prompt_shape(len(prompt), prompt.spans), 16)
        cache = SequenceCache(self.pool, plan, len(prompt), prompt.spans, self.shape.layers)
        rng = np.random.default_rng(seed)
        for layer in range(self.shape.layers):
            last, total = rng.random((2, len(prompt)))
            stored = cache.store_prompt(layer, last, total)
            self.rows.store_prompt(cache, layer, stored, *self.new_rows(len(prompt)))
        return cache


def test_a_step_with_low_rank_rows_stays_on_the_device(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are fitted, written, read, attended and moved where they lie; of the host come ids alone."""
    places, module = Places(checkpoint, monkeypatch), Nothing()
    kernels = Kernels(module, KernelShape(16, 2, "Half"), packed=module.packed)
    with torch.inference_mode(), OneDevice():
        kinds: Sequence[tuple[Method, Formats]] = [
            (AttentionPack(), PACK),
            (Full(), Formats()),
            (Avl(secondary=80, core=30, refresh=1), Formats("int8", "int4", "lowrank:8+int8")),
        ]
        caches = [places.start(*each, seed) for seed, each in enumerate(kinds)]
        for cache in caches:
            cache.begin_step()
        layers = range(places.shape.layers)
        reads = [[cache.rows_to_read(layer) for layer in layers] for cache in caches]
        low = LowRankReads(places.rows, places.device, caches, reads, 0.25)
        assert low.numbers == {0, 2}
        bucket = Bucket(4, 256, False, ("exact", "int8"), ("exact", "int8"))
        step = DecodeStep(places.model, kernels, Pool(16, 16, 2, 32, 16, 32, 16), places.device, bucket, splits=2)
        step.run(low.attend)
        weights = [each for of_layer in low._weights.values() for each in of_layer]
        assert len(low._weights) == 2 * len(layers)
        assert {each.device.type for each in weights} == {"meta"}
        moved = 0
        for cache, read in zip(caches, reads, strict=True):
            for layer in layers:
                count = sum(len(each.ids) for each in read[layer])
                changes = cache.settle(layer, np.random.default_rng(layer).random(count))
                moved += sum(len(each.before) for each in changes)
                places.rows.move(cache, layer, changes)
        assert moved, "between int4 and coefficients"


def test_an_operator_over_two_devices_is_noticed(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(checkpoint, monkeypatch)
    monkeypatch.setattr(RowStore, "index", lambda _, ids: torch.from_numpy(ids.astype(np.int64)))
    with torch.inference_mode(), OneDevice(), pytest.raises(AssertionError, match="over"):
        places.start(AttentionPack(), PACK, 0)


def test_an_interrupted_step_leaves_nothing_behind(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step waits for what was queued, and its scores are its own."""
    oracle, ours, device = both(checkpoint("llama-mha"))
    with monkeypatch.context() as patch:
        spoiled, _ = ours.start(random_prompt(ours.spec, 0)[0], AttentionPack(), PACK)
        patch.setattr(LowRankReads, "fetch", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            ours.backend.decode([5], [spoiled])
        spoiled.close()
    device.log.clear()
    requests: list[Request] = [(random_prompt(ours.spec, 1)[0], AttentionPack(), PACK)]
    run_both(oracle, Side(ours.backend, ours.spec, 4, ours.pool.pages), requests, 1e-4, steps=2)
    assert device.log == ["synchronize"] * (1 + 3), "once before the first step, and once in each"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
