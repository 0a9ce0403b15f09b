"""Random checkpoints in float64, prompts and settings on which the oracle runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tests.equipment.checkpoints import SPECS, random_image
from tests.equipment.oracle import AvlSettings, OracleStep, generate

EVERYTHING = AvlSettings(prefill_keep=100, secondary=100, core=100, text_keep=100)
TIGHT = AvlSettings(text_keep=50, text_floor=6)
STEPS = 12
ONE_IMAGE = "USER: <image>\nWhat is shown in this picture, and where is the bicycle? ASSISTANT:"
TWO_IMAGES = "A polite chat. USER: <image>\nThen look at <image>\nHow do the two of them differ? ASSISTANT:"


@dataclass(frozen=True)
class Case:
    """A checkpoint as transformers reads it, and the prompts that the oracle is asked."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    directory: Path

    def inputs(self, text: str = ONE_IMAGE) -> tuple[Tensor, Tensor]:
        images = [random_image(seed, (70 + 20 * seed, 60)) for seed in range(text.count("<image>"))]
        batch = self.processor(text=text, images=images, return_tensors="pt")
        return batch["input_ids"], batch["pixel_values"].double()

    def run(self, settings: AvlSettings, text: str = ONE_IMAGE, steps: int = STEPS) -> list[OracleStep]:
        return generate(self.model, *self.inputs(text), settings, steps)


Cases = Callable[[str], Case]
ALL = pytest.mark.parametrize("name", SPECS)
SOME = pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-full", "mistral-gqa", "qwen2-tied"])
PROMPTS = pytest.mark.parametrize("text", [ONE_IMAGE, TWO_IMAGES], ids=["one image", "two images"])


def tokens(steps: list[OracleStep]) -> list[int]:
    return [step.token for step in steps]
