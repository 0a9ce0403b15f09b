"""A policy that raises in a step ends its own sequence: the others' numbers and rows are what they would be without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from avl_edge.backends.base import run_whole
from avl_edge.backends.step_batch import StepBatch, StepResult
from avl_edge.kv.cache import SequenceCache
from avl_edge.kv.methods import Avl, Coarse, Full, Method
from avl_edge.model.network.image_features import ImageFeatures
from tests.conftest import Checkpoints
from tests.equipment.cuda_sides import Side, both, membership, random_prompt

STEPS = 4
METHODS: tuple[Method, ...] = (Avl(refresh=2, text_keep=60, text_floor=4), Coarse(core=30), Full())
HOOKS = {"picks_core": 0, "wants_scores": 0, "reads_secondary": 0, "settle_step": 0, "pick_core": 1, "nucleus": 1}
"""What a backend asks of a policy in a step, and which of METHODS is asked it."""


class PolicyFailed(Exception):
    pass


class FailingPolicy:
    """A policy that raises where it is asked for the ``left``-th time from now."""

    def __init__(self, policy: Any, hook: str, left: int) -> None:
        self._policy, self._hook, self._left = policy, hook, left

    def __getattr__(self, name: str) -> Any:
        if name == self._hook:
            self._left -= 1
            if self._left == 0:
                raise PolicyFailed(name)
        return getattr(self._policy, name)


def _run(side: Side, fails: int | None, hook: str, left: int = 1) -> tuple[list[Any], list[SequenceCache]]:
    """Logits of ``STEPS`` steps of the sequences that do not fail, in the first step, and their caches."""
    caches = [side.start(random_prompt(side.spec, seed), method)[0] for seed, method in enumerate(METHODS)]
    others = [number for number in range(len(METHODS)) if number != fails]
    if fails is not None:
        caches[fails].policy = FailingPolicy(caches[fails].policy, hook, left)  # type: ignore[assignment]
    result = side.backend.decode([5, 6, 7], caches)
    assert {number: type(error) for number, error in result.failures.items()} == (
        {} if fails is None else {fails: PolicyFailed}
    )
    steps = [result.logits[[0, 1, 2] if fails is None else others]]
    if fails is not None:
        side.pool.rebuild(caches[number].rows for number in others)  # what that sequence held is in no order
        caches = [caches[number] for number in others]
    for _ in range(STEPS):
        steps.append(side.backend.decode([5] * len(caches), caches).logits)
    side.pool.check_integrity(cache.rows for cache in caches)
    return steps, caches


@pytest.mark.parametrize("left", [1, 2], ids=["at once", "in the next layer"])
@pytest.mark.parametrize("hook", ["reads_secondary", "pick_core"])
def test_the_others_go_on_to_the_bit(checkpoint: Checkpoints, hook: str, left: int) -> None:
    """On the CPU, whose numbers do not depend on who else is in the batch."""
    _sides_agree(checkpoint("llama-mha"), 0, hook, left, 0.0)


@pytest.mark.parametrize("hook", ["picks_core", "wants_scores", "settle_step"])
def test_the_others_go_on_after_what_is_asked_once(checkpoint: Checkpoints, hook: str) -> None:
    _sides_agree(checkpoint("llama-mha"), 0, hook, 1, 0.0)


@pytest.mark.parametrize("hook", [name for name in HOOKS if name != "pick_core"])
def test_the_others_go_on_on_a_gpu(checkpoint: Checkpoints, hook: str) -> None:
    _sides_agree(checkpoint("llama-mha"), 1, hook, 1, 1e-5)


def _sides_agree(directory: Path, number: int, hook: str, left: int, tolerance: float) -> None:
    fails = HOOKS[hook]
    expected, theirs = _run(both(directory)[number], None, hook)
    got, own = _run(both(directory)[number], fails, hook, left)
    others = [each for each in range(len(METHODS)) if each != fails]
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, b[others], rtol=0, atol=tolerance * float(b.abs().max()), msg=f"step {step}")
    assert [membership(each) for each in own] == [membership(theirs[each]) for each in others]


def test_nobody_is_left(checkpoint: Checkpoints) -> None:
    for side in both(checkpoint("llama-mha"))[:2]:
        cache, _ = side.start(random_prompt(side.spec, 0), Full())
        cache.policy = FailingPolicy(cache.policy, "reads_secondary", 1)  # type: ignore[assignment]
        result = side.backend.decode([5], [cache], greedy=True)
        assert list(result.failures) == [0]


def test_results_stand_in_the_order_of_the_sequences() -> None:
    class Cache:
        def __init__(self, number: int) -> None:
            self.number = number

        def begin_step(self) -> tuple[int, Any]:
            if self.number == 1:
                raise PolicyFailed
            return 10 * self.number, None

    batch = StepBatch([4, 5, 6], [Cache(number) for number in range(3)])  # type: ignore[list-item]
    assert (batch.token_ids, batch.positions) == ([4, 6], [0, 20])
    assert list(batch.result([7, 9]).tokens) == [7, 0, 9]
    spread = batch.result(logits=torch.tensor([[1.0, 2.0], [5.0, 6.0]])).logits
    assert spread is not None
    assert spread[[0, 2]].tolist() == [[1.0, 2.0], [5.0, 6.0]]
    joined = StepResult.joined([(0, StepResult([1, 2])), (2, batch.result([7, 9]))])
    assert (list(joined.tokens), list(joined.failures)) == ([1, 2, 7, 0, 9], [3])


def test_a_prompt_and_pictures_are_advanced_layer_by_layer(checkpoint: Checkpoints) -> None:
    """A layer at a time, two at a time or all at once: the same numbers, in as many calls as there are layers."""
    side = both(checkpoint("llama-mha"))[0]
    prompt = random_prompt(side.spec, 3, images=2)
    results = []
    for layers in (1, 2, 1000):
        encode, calls = side.backend.begin_encode(prompt.pixel_values.pictures), 1
        while (features := encode.advance(layers)) is None:
            calls += 1
        vision = 2 * max(side.spec.feature_layers)
        assert calls == -(-vision // layers)
        task, calls = side.backend.begin_prefill(prompt, features, side.admit(prompt, Avl())), 1
        while (logits := task.advance(layers)) is None:
            calls += 1
        assert calls == -(-side.spec.text.layers // layers)
        results.append((features, logits))
    for features, logits in results[1:]:
        assert torch.equal(features.tokens, results[0][0].tokens)
        assert torch.equal(logits, results[0][1])
    alone = [run_whole(side.backend.begin_encode(prompt.pixel_values.pictures[at : at + 1])) for at in range(2)]
    assert torch.equal(ImageFeatures.joined(alone).tokens, results[0][0].tokens), (
        "a picture's features do not depend on its company"
    )
