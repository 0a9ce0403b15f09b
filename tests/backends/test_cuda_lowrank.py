"""Low-rank rows on the GPU backend against the oracle: alone, and in one step with rows that the kernels read."""

from __future__ import annotations

import pytest
import torch

from avl_edge.config import Formats
from avl_edge.kv.methods import H2O, AttentionPack, Avl, Coarse, Full, Method
from tests.conftest import Checkpoints
from tests.equipment.cuda_sides import STEP_OF, Request, both, random_prompt, run_both

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
    prompts = [random_prompt(oracle.spec, seed, images=images) for seed, images in enumerate((1, 2, 0))]
    method, formats = KINDS[kind]
    run_both(oracle, ours, [(prompt, method, formats) for prompt in prompts], STEP_OF[formats.text])
    steps = 8 + len(prompts)
    assert device.log.count("synchronize") == steps + len(prompts), "a prompt and a step wait once each"


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
    requests: list[Request] = [(random_prompt(oracle.spec, seed), *each) for seed, each in enumerate(kinds)]
    run_both(oracle, ours, requests, STEP_OF["int4"])
    assert device.log.count("synchronize") == 8 + 2 * len(kinds), "a prompt and a step wait once each"


def test_low_rank_rows_are_read_in_the_recording(checkpoint: Checkpoints) -> None:
    """Every step is a replay; each low-rank format that somebody reads costs one launch."""
    _, ours, device = both(checkpoint("llama-mha"))
    pack, _ = ours.start(random_prompt(ours.spec, 0), AttentionPack(), PACK)
    avl, _ = ours.start(random_prompt(ours.spec, 1), Avl(refresh=3, text_keep=100), SECONDARY)
    exact, _ = ours.start(random_prompt(ours.spec, 2), Full())
    launched = device.launched
    plain, refresh = ["avl_attend", "avl_merge"], ["avl_attend", "avl_attend_low_rank", "avl_merge", "avl_scores"]
    packed = [*refresh[:2], *refresh[1:]]
    for caches, last in (
        ([exact, pack], packed),
        ([exact, avl], plain),
        ([exact, avl], plain),
        ([exact, avl], refresh),
        ([exact], plain),
        ([pack], packed),
    ):
        ours.backend.decode([5] * len(caches), caches)
        assert device.log[-2:] == ["replay", "synchronize"]
        assert launched[-len(last) - 1 :] == ["avl_append", *last]


def test_rows_are_listed_with_their_positions_and_bases(checkpoint: Checkpoints) -> None:
    """Of sequences with bases of different sizes, as far as a step reads them; elsewhere there is no such table."""
    _, ours, _ = both(checkpoint("llama-mha"))
    kinds = ((AttentionPack(), PACK), (Full(), Formats()), (AttentionPack(), Formats("int8", *["lowrank:12@3"] * 2)))
    caches = [ours.start(random_prompt(ours.spec, n), *each)[0] for n, each in enumerate(kinds)]
    ours.backend.decode([5] * 3, caches)
    (tables,) = (step.tables for step in ours.backend.steps.values())
    assert tables.bucket.formats == ("exact", "int8", "lowrank:12@3", "lowrank:8", "lowrank:8@2")
    assert tables.device_bases.shape == (ours.spec.text.layers, 4 * 8), "of the twelve directions three are read"
    for layer in range(ours.spec.text.layers):
        rows, positions = tables.device_rows[layer].tolist(), tables.device_row_positions[layer].tolist()
        for number, cache in enumerate(caches):
            held, found = cache.rows.layers[layer], {}
            for name in tables.bucket.formats:  # an id of one may be another's, and image rows come last
                begin, end = tables.offsets[layer, tables.list_of(number, name) :][:2]
                found |= dict(zip(rows[begin:end], positions[begin:end], strict=True))
            assert [found[row] for row in held.image_ids.tolist()] == held.image_positions.tolist()
            basis = tables.device_bases[layer].view(4, 8)[number].tolist()
            assert basis[: len(held.basis)] == held.basis.tolist()[:8]
    ours.backend.decode([5], caches[1:2])
    assert not hasattr(list(ours.backend.steps.values())[-1].tables, "device_bases")


def test_neighbours_are_attended_by_the_kernels_as_without_low_rank_rows(checkpoint: Checkpoints) -> None:
    """The same logits, bit for bit, where the batch is as large."""
    directory, logits = checkpoint("llama-gqa-full"), []
    for other in ((AttentionPack(), PACK), (Full(), Formats())):
        _, ours, _ = both(directory)
        exact, _ = ours.start(random_prompt(ours.spec, 0), Full())
        neighbour, _ = ours.start(random_prompt(ours.spec, 1), *other)
        logits.append([ours.backend.decode([5, 6], [exact, neighbour]).logits[0] for _ in range(4)])
    assert all(torch.equal(got, expected) for got, expected in zip(*logits, strict=True))


def test_greedy_tokens_are_those_of_the_logits(checkpoint: Checkpoints) -> None:
    sides = [both(checkpoint("llama-gqa-full"))[1] for _ in range(2)]
    kinds = ((AttentionPack(), PACK), (Full(), Formats()), (AttentionPack(), PACK))
    held = [[side.start(random_prompt(side.spec, n), *each)[0] for n, each in enumerate(kinds)] for side in sides]
    tokens = [5, 6, 7]
    for _ in range(6):
        expected = sides[0].backend.decode(tokens, held[0]).logits.argmax(-1).tolist()
        tokens = sides[1].backend.decode(tokens, held[1], greedy=True).tokens
        assert tokens == expected
