"""Families beside LLaVA-1.5 on the GPU's path, run on the CPU, against the torch backend."""

from __future__ import annotations

import pytest

from avl_edge import BadInput, Formats, Options, Runtime
from avl_edge.backends.cuda.target import Cuda
from avl_edge.config import PromptShape
from avl_edge.kv.methods import Choice, Full
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.cuda_on_cpu import backend_for

IMAGES = [random_image(1, (70, 90)), random_image(2, (200, 64))]
ONE_OF_EACH = ["llava_next-mistral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl-qwen2"]


@pytest.mark.parametrize("options", [Options("full"), Options("avl", {"prune_layer": 0, "prefill_keep": 60})])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_answers_are_those_of_the_torch_backend(family: Checkpoints, name: str, options: Options) -> None:
    """Positions of three axes in the prompt, the difference kept behind it, DeepStack's features where they belong."""
    directory, answers = family(name), []
    for on_gpu in (False, True):
        runtime = Runtime.load(directory, threaded=False, pool_bytes=2**22)
        if on_gpu:
            backend, _ = backend_for(directory, runtime.debug.pool.pages)
            runtime.debug.replace_backend(backend)
        answers.append(runtime.generate(IMAGES, "What is shown here?", options).result().token_ids[:24])
    assert answers[0] == answers[1]


def test_low_rank_rows_at_positions_of_three_axes_are_refused(
    family: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avl_edge.backends.cuda.target.CudaDevice", lambda: None)
    low_rank, prompt = Choice(Full(), Formats("exact", "lowrank:8", "lowrank:8")), PromptShape(1, 4, 1)
    for name in ("qwen2_5_vl", "llava_next-mistral"):
        runtime, target = Runtime.open(family(name)), Cuda(family(name))
        if name == "qwen2_5_vl":
            with pytest.raises(BadInput, match="M-RoPE"):
                target.check(low_rank, prompt, runtime.spec)
        else:
            target.check(low_rank, prompt, runtime.spec)
        target.check(Choice(Full(), Formats("int8", "int8", "int4")), prompt, runtime.spec)
