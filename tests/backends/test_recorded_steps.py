"""Recorded steps hold memory: it is counted, and the least recently used ones go as far as the limit asks."""

from __future__ import annotations

import torch

from avl_edge.kv.methods import Full
from tests.conftest import Checkpoints
from tests.equipment.cuda_sides import both, random_prompt


def test_recordings_are_kept_as_far_as_their_bytes_go(checkpoint: Checkpoints) -> None:
    """All tensors of a step are counted; the least recently used goes first, and the one that runs never does."""
    _, ours, device = both(checkpoint("llama-mha"))
    caches = [ours.start(random_prompt(ours.spec, seed), Full())[0] for seed in range(4)]
    ours.backend.decode([5], caches[:1])
    ours.backend.decode([5] * 2, caches[:2])
    steps, entry = ours.backend.steps, ours.backend.steps.entry
    sizes = [step.nbytes for step in steps.values()]
    for step in steps.values():
        values = [*vars(step).values(), *vars(step.tables).values()]
        values += [each for held in values if isinstance(held, dict) for each in held.values()]
        memory = {each.data_ptr(): each.untyped_storage() for each in values if isinstance(each, torch.Tensor)}
        assert step.nbytes == sum({each.data_ptr(): each.nbytes() for each in memory.values()}.values())
    assert entry.used == sum(sizes)
    entry.limit = sum(sizes)
    ours.backend.decode([5] * 4, caches)
    assert [bucket.batch for bucket in steps] == [4]
    assert entry.used == next(iter(steps.values())).nbytes <= entry.limit
    ours.backend.decode([5], caches[:1])
    assert device.log.count("record") == 4
