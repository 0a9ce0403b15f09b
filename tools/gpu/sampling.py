"""Tokens chosen on a GPU, where the logits lie, against the CPU's choice from the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from avl_edge.config import Options
from avl_edge.model.sampling import Sampler, distribution
from tools.gpu.dut import DeviceUnderTest, require

VOCABULARY = 152_064
DRAWS = 64
OPTIONS = {
    "plain": Options(temperature=1.0, seed=1),
    "top_k": Options(temperature=0.7, top_k=40, seed=2),
    "nucleus": Options(temperature=1.3, top_p=0.9, min_p=0.001, seed=3),
    "penalties": Options(repetition_penalty=1.2, presence_penalty=0.5, logit_bias={7: 3.0, 90_000: -100.0}, logprobs=5),
}


def check_sampling(dut: DeviceUnderTest) -> dict[str, float]:
    """Of each kind of request: the most that probabilities differ. Draws with one seed fall on the same tokens; one of
    them may fall on a border that the last bits move."""
    generator, device, found = torch.Generator().manual_seed(0), dut.accelerator.device, dict[str, float]()
    logits = [4 * torch.randn(VOCABULARY, generator=generator) for _ in range(DRAWS)]
    for name, options in OPTIONS.items():
        found[name] = max(_probabilities(each.to(device), options, each) for each in logits[:4])
        require(found[name] <= 1e-6, f"{name}: probabilities are {found[name]:.1e} from the CPU's")
        ours, theirs = Sampler(options, range(100)), Sampler(options, range(100))
        differing = 0
        for each in logits:
            differing += ours(each.to(device)) != theirs(each)
            require(_logprobs_agree(ours, theirs), f"{name}: log-probabilities differ from the CPU's")
        require(differing <= 1, f"{name}: {differing} of {DRAWS} tokens differ from the CPU's")
    return found


def _probabilities(got: Tensor, options: Options, expected: Tensor) -> float:
    if options.temperature == 0:
        return 0.0
    dense = []
    for scores in (got, expected):
        ids, weights = distribution(scores, options)
        spread = torch.zeros(VOCABULARY, dtype=torch.float64)
        spread[ids.cpu()] = weights.double().cpu() / float(weights.double().sum())
        dense.append(spread)
    return float((dense[0] - dense[1]).abs().max())


def _logprobs_agree(ours: Sampler, theirs: Sampler) -> bool:
    if ours.logprobs is None or theirs.logprobs is None:
        return ours.logprobs is theirs.logprobs
    both = zip(ours.logprobs.top, theirs.logprobs.top, strict=True)
    return all(a.token_id == b.token_id and abs(a.logprob - b.logprob) < 1e-4 for a, b in both)
