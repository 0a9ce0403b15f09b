"""Low-rank rows on the GPU backend against the oracle: alone, and in one step with rows that the kernels read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avl_edge.config import Formats
from avl_edge.cuda_backend.low_rank import LowRankReads
from avl_edge.policies import H2O, AttentionPack, Avl, Coarse, Full, Method
from tests.conftest import Checkpoints
from tests.cuda_sides import (
    STEP_OF,
    Request,
    Side,
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
