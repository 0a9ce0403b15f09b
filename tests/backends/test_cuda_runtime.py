"""The runtime on a GPU, with a device and kernels of the CPU in its place."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from typer.testing import CliRunner

from avl_edge import BadInput, Formats, Options, Runtime
from avl_edge.attention.cuda import Kernels, KernelShape, NoCuda
from avl_edge.backends.steps import RecordedStep
from avl_edge.cli import app, run_app
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.cuda_on_cpu import HostDevice, reference_kernels
from tests.equipment.image_sessions import AVL, COARSE, FIRST, FULL, IMAGES, PROMPT_MEAN, SECOND, is_empty
from tests.equipment.prompts_first import STEPPED

PROMPT = "What is shown in this picture?"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of the CPU's; what the CPU itself computes is torch's, which rounds where a GPU's step does."""

    def load(shape: KernelShape, _: int = 0) -> Kernels:
        dtype = {"Half": "float16", "Bfloat": "bfloat16"}[shape.row]
        return reference_kernels(shape.head_dim, shape.group, getattr(torch, dtype))

    monkeypatch.setattr("avl_edge.backends.cuda.target.CudaDevice", HostDevice)
    monkeypatch.setattr(Kernels, "load", load)
    monkeypatch.setattr("avl_edge.backends.cpu.native.serves", lambda _: False)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_answers_are_those_of_the_cpu(checkpoint: Checkpoints, temperature: float) -> None:
    directory = checkpoint("llama-gqa-full", dtype=torch.float16)
    options = Options(method="full", max_new_tokens=12, temperature=temperature, seed=3)
    answers = []
    for device in ("cpu", "cuda"):
        runtime = Runtime.load(directory, device=device, **STEPPED)
        running = [runtime.generate([random_image(seed, 60)], PROMPT, options) for seed in range(3)]
        answers.append([generation.result() for generation in running])
    assert [each.token_ids for each in answers[0]] == [each.token_ids for each in answers[1]]
    assert answers[1][0].backend == "torch-cpu+kernels"


@pytest.mark.usefixtures("gpu")
def test_greedy_answers_are_chosen_on_the_device(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordedStep, "logits", property(lambda _: pytest.fail("the logits came back")))
    runtime = Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float16), device="cuda", **STEPPED)
    result = runtime.generate([], PROMPT, Options(method="full", max_new_tokens=5)).result()
    assert len(result.token_ids) == 5


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "options",
    [
        Options(formats=Formats("int8", "int8", "int8"), max_new_tokens=8),
        Options(method="avl", formats=Formats("exact", "int8", "int4"), max_new_tokens=8),
        Options(method="coarse", formats=Formats("exact", "int4", "int4"), max_new_tokens=8),
        Options(kv_budget=60_000, max_new_tokens=8),
    ],
    ids=["packed", "tiers", "coarse", "what a budget takes"],
)
def test_packed_answers_are_those_of_the_cpu(checkpoint: Checkpoints, options: Options) -> None:
    directory = checkpoint("llama-gqa-full", dtype=torch.float16)
    answers = []
    for device in ("cpu", "cuda"):
        runtime = Runtime.load(directory, device=device, **STEPPED)
        answers.append(runtime.generate([random_image(0, 60)], PROMPT, options).result())
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].method == answers[1].method


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("method", "formats"),
    [
        ("attentionpack", Formats("exact", "lowrank:8", "lowrank:8@2")),
        ("attentionpack", Formats("int8", "lowrank:8+int8", "lowrank:8+int8")),
        ("avl", Formats("exact", "int8", "lowrank:8")),
    ],
    ids=["attentionpack", "packed coefficients", "secondary rows"],
)
def test_low_rank_answers_are_those_of_the_cpu(checkpoint: Checkpoints, method: str, formats: Formats) -> None:
    """Beside an answer over exact rows, in the same steps."""
    directory = checkpoint("llama-gqa-full", dtype=torch.float16)
    both = [Options(method=method, formats=formats, max_new_tokens=8), Options(method="full", max_new_tokens=8)]
    answers = []
    for device in ("cpu", "cuda"):
        runtime = Runtime.load(directory, device=device, **STEPPED)
        running = [runtime.generate([random_image(seed, 60)], PROMPT, own) for seed, own in enumerate(both)]
        answers.append([generation.result() for generation in running])
        assert is_empty(runtime)
    for expected, got in zip(*answers, strict=True):
        assert got.token_ids == expected.token_ids
        for name in ("bytes_stored", "bytes_peak", "bytes_read_fraction", "rows_read_fraction"):
            assert getattr(got.kv, name) == getattr(expected.kv, name)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "options",
    [FULL, AVL, COARSE, PROMPT_MEAN, Options(preset="lossless", max_new_tokens=24)],
    ids=["full", "avl", "coarse", "prompt_mean", "lossless"],
)
def test_answers_about_a_prefix_are_those_of_the_cpu(checkpoint: Checkpoints, options: Options) -> None:
    """Two questions at once, one after them, and a plain request between."""
    directory = checkpoint("mistral-gqa", dtype=torch.float16)
    answers = []
    for device in ("cpu", "cuda"):
        runtime = Runtime.load(directory, device=device, **STEPPED)
        with runtime.open_images(IMAGES, options) as shared:
            plain = runtime.generate(IMAGES[:1], FIRST, FULL)
            questions = [shared.ask(FIRST), shared.ask(SECOND)]
            answers.append([each.result() for each in (*questions, plain)])
            answers[-1].append(shared.ask(SECOND).result())
        assert is_empty(runtime)
    assert [each.token_ids for each in answers[0]] == [each.token_ids for each in answers[1]]
    assert [each.kv.bytes_stored for each in answers[0]] == [each.kv.bytes_stored for each in answers[1]]


@pytest.mark.usefixtures("gpu")
def test_a_model_that_the_kernels_do_not_take_is_refused_when_it_is_opened(checkpoint: Checkpoints) -> None:
    with pytest.raises(BadInput, match="float16 or bfloat16, not float32: convert the checkpoint"):
        Runtime.open(checkpoint("llama-gqa-full", dtype=torch.float32), device="cuda", **STEPPED)


@pytest.mark.usefixtures("gpu")
def test_a_reserve_of_the_profile_does_not_forbid_the_gpu(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every board with a profile has a reserve by default; only one that was asked for is refused there."""
    command = import_module("avl_edge.cli.run")
    loaded = Runtime.load(checkpoint("llama-gqa-full", dtype=torch.float16), device="cuda", **STEPPED)
    monkeypatch.setattr(command, "reserve_bytes", lambda _: 1000)
    monkeypatch.setattr(command.Runtime, "open", lambda *_, **__: loaded)
    monkeypatch.setattr(command.Runtime, "load_weights", lambda *_, **__: None)
    arguments = ["run", "--prompt", "hi", "--device", "cuda", "--max-new-tokens", "2"]
    assert run_app(arguments) == 0
    assert run_app([*arguments, "--reserve", "1kB"]) == 2
    assert "no part of a GPU's rows can be handed back to the system" in capsys.readouterr().err


def test_without_a_gpu_the_command_ends_with_2(checkpoint: Checkpoints) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(NoCuda):
        Runtime.load(checkpoint("llama-gqa-full"), device="cuda", **STEPPED)
    with pytest.raises(BadInput, match="no device 'tpu': choose one of cpu, cuda"):
        Runtime.load(checkpoint("llama-gqa-full"), device="tpu", **STEPPED)
    assert CliRunner().invoke(app, ["run", "--prompt", "hi", "--device", "cuda"]).exit_code != 0
