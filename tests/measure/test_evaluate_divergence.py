"""How far a method's expectations are from full attention's, against transformers and the oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from avl_edge import Options, Runtime
from avl_edge.measure.evaluate import Divergence, Setting
from avl_edge.measure.evaluate.divergence import kl_per_token
from avl_edge.model.weight_format import WeightFormats
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.oracle import load_model
from tests.equipment.oracle_baselines import Case, fastv
from tests.equipment.pixels import stacked


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> str:
    return str(checkpoint("mistral-gqa"))


@pytest.fixture(scope="module")
def runtime(model: str) -> Runtime:
    return Runtime.open(model)


class TestDivergence:
    """Against transformers: the model itself for full attention, the masked oracle for a method."""

    def _prepare(self, runtime: Runtime, **options: Any) -> Any:
        return runtime.prepare([random_image(3, (120, 80))], "What is it?", Options(max_new_tokens=8, **options))

    def test_full_attention_expects_what_transformers_does(self, runtime: Runtime, model: str) -> None:
        request = self._prepare(runtime, method="full")
        token_ids = [17, 300, 25, 41, 99]
        divergence = Divergence(runtime, Path(model), WeightFormats())
        own = divergence.log_probabilities(request, divergence.encode(request), token_ids)
        reference = LlavaForConditionalGeneration.from_pretrained(model).eval()
        prompt = request.prompt
        with torch.no_grad():
            ids = torch.tensor([[*prompt.token_ids, *token_ids]])
            logits = reference(input_ids=ids, pixel_values=torch.from_numpy(stacked(prompt))).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(own, expected, atol=2e-4, rtol=0)

    def test_a_method_expects_what_its_oracle_does(self, runtime: Runtime, model: str) -> None:
        request = self._prepare(runtime, method="fastv", parameters={"layer": 1, "drop": 80})
        prompt = request.prompt
        pixels = torch.from_numpy(stacked(prompt)).double()
        steps = fastv(Case(load_model(Path(model)), list(prompt.token_ids), pixels, 8), layer=1, drop=80)
        divergence = Divergence(runtime, Path(model), WeightFormats())
        own = divergence.log_probabilities(request, divergence.encode(request), [step.token for step in steps])
        expected = torch.stack([step.logits for step in steps]).log_softmax(-1)
        torch.testing.assert_close(own.double(), expected, atol=2e-4, rtol=0)

    def test_kl_is_its_definition(self) -> None:
        full, other = (torch.randn(5, 11).log_softmax(-1) for _ in range(2))
        p, q = full.double().exp().numpy(), other.double().exp().numpy()
        assert kl_per_token(full, other) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)

    def test_full_is_at_no_distance_and_less_memory_at_some(self, runtime: Runtime, model: str) -> None:
        full = self._prepare(runtime, method="full")
        requests = {
            Setting("h2o", share): self._prepare(runtime, method="h2o", parameters={"budget": 100 * share, "grow": 1})
            for share in (1.0, 0.2)
        }
        whole, little = Divergence(runtime, Path(model), WeightFormats()).from_full(full, [5, 6, 7], requests).values()
        assert whole < 1e-9 < 1e-4 < little
