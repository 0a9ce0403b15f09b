"""AttentionPack against the oracle: the same tokens, the same important rows in every layer after every step."""

from __future__ import annotations

import pytest
import torch

from avl_edge import BadInput, Formats, Options, Runtime
from tests.conftest import Checkpoints
from tests.equipment import oracle
from tests.equipment.checkpoints import random_image
from tests.equipment.oracle_attentionpack import PackSettings, generate
from tests.equipment.pixels import stacked
from tests.equipment.recorder import Recorder

STEPS = 24
PROMPT = "What is shown in the picture, and how many boats are there?"
IMAGE = random_image(1, (70, 90))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama-mha", PackSettings(8, 2)),
        ("qwen2-gqa", PackSettings(8, 4, core=50)),
        ("mistral-yarn", PackSettings(8, 1, core=12, decay=50)),
        ("llama-bias", PackSettings(12, 12, decay=0)),
    ],
)
def test_tokens_and_core_equal_the_oracle(checkpoint: Checkpoints, name: str, settings: PackSettings) -> None:
    directory = checkpoint(name, dtype=torch.float64)
    runtime = Runtime.load(directory, threaded=False)
    recorder = Recorder(runtime)
    formats = Formats("exact", f"lowrank:{settings.rank}", f"lowrank:{settings.rank}@{settings.low}")
    parameters = {"core": settings.core, "decay": settings.decay}
    options = Options("attentionpack", parameters, formats, max_new_tokens=STEPS)
    request = runtime.prepare([IMAGE], PROMPT, options)
    generation, prompt = runtime.submit(request), request.prompt
    assert prompt.pixel_values is not None
    expected = generate(
        oracle.load_model(directory),
        torch.tensor([prompt.token_ids]),
        torch.from_numpy(stacked(prompt)),
        settings,
        STEPS,
    )
    for step, event in zip(expected, generation, strict=True):
        assert event.token_id == step.token
        cache = generation.cache
        assert cache is not None
        if event.finish_reason is None:
            core = [tuple(rows.image_positions[rows.core].tolist()) for rows in cache.rows.layers]
            assert core == step.core
    # Low-rank rows are computed in float32: its rounding, through a few layers.
    for own, step in zip(recorder.logits, expected, strict=True):
        torch.testing.assert_close(
            own.double(), step.logits.double(), rtol=0, atol=2e-4 * float(step.logits.abs().max())
        )


def test_the_published_settings_are_the_usual_ones() -> None:
    plan = Runtime.open(threaded=False).prepare([IMAGE], PROMPT, Options("attentionpack")).plan
    assert plan.formats == Formats("exact", "lowrank:64", "lowrank:64@16")


@pytest.mark.parametrize("parameters", [{"core": 101}, {"core": -1}, {"decay": 100}, {"decay": -3}])
def test_misuse(parameters: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        Runtime.open(threaded=False).prepare([IMAGE], PROMPT, Options("attentionpack", parameters))
