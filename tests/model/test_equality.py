"""Full attention gives what transformers gives: logits and greedy tokens, on random checkpoints of every family."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from avl_edge import Options, Runtime
from avl_edge.request import Prompt
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import SPECS, random_image
from tests.equipment.pixels import stacked
from tests.equipment.recorder import Recorder

TOKENS = 64
PROMPT = "What is shown in this picture?"
IMAGES = [random_image(1, (70, 90)), random_image(2, (200, 64))]


def _generate(directory: object, images: list[Image.Image]) -> tuple[Prompt, list[int], Tensor]:
    runtime = Runtime.load(directory, threaded=False)  # type: ignore[arg-type]
    record = Recorder(runtime)
    request = runtime.prepare(images, PROMPT, Options(method="full", max_new_tokens=TOKENS))
    tokens = list(runtime.submit(request).result().token_ids)
    return request.prompt, tokens, torch.stack(record.logits)


def _inputs(prompt: Prompt, dtype: torch.dtype) -> dict[str, Tensor]:
    assert prompt.pixel_values is not None
    return {"input_ids": torch.tensor([prompt.token_ids]), "pixel_values": torch.from_numpy(stacked(prompt)).to(dtype)}


@torch.no_grad()
def _reference_logits(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """What transformers says at every step, given our tokens so far: ``[len(tokens), vocabulary]``."""
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    return model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, length - 1 : -1]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name].dtype == torch.float32])
def test_float32_logits_and_tokens_equal_transformers(checkpoint: Checkpoints, name: str, images: int) -> None:
    prompt, tokens, logits = _generate(checkpoint(name), IMAGES[:images])
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint(name)).eval()
    inputs = _inputs(prompt, torch.float32)
    expected = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokens == expected.tolist()
    assert (logits - _reference_logits(model, inputs, tokens)).abs().max() <= 2e-4


@pytest.mark.parametrize("images", [1, 2])
def test_bfloat16_is_as_close_to_float64_as_transformers(checkpoint: Checkpoints, images: int) -> None:
    """Greedy tokens of two bfloat16 programs part at ties, so errors are compared: ours, and transformers' own."""
    directory = checkpoint("llama-bf16")
    prompt, tokens, logits = _generate(directory, IMAGES[:images])
    exact_model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float64).eval()
    exact = _reference_logits(exact_model, _inputs(prompt, torch.float64), tokens)
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16).eval()
    theirs = (_reference_logits(model, _inputs(prompt, torch.bfloat16), tokens) - exact).square().mean().sqrt()
    ours = (logits - exact).square().mean().sqrt()
    assert ours <= 1.25 * theirs
    assert ours <= 0.03 * exact.std()


def test_sharded_checkpoint_equals_the_single_file(checkpoint: Checkpoints) -> None:
    sharded = checkpoint("mistral-gqa", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    _, tokens, logits = _generate(sharded, IMAGES[:1])
    _, expected, expected_logits = _generate(checkpoint("mistral-gqa"), IMAGES[:1])
    assert tokens == expected
    # Not bit for bit: matrix products round by the alignment of their operands, and the files lay them differently.
    assert (logits - expected_logits).abs().max() <= 1e-5


def test_text_alone_equals_transformers(checkpoint: Checkpoints) -> None:
    prompt, tokens, _ = _generate(checkpoint("qwen2-gqa"), [])
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint("qwen2-gqa")).eval()
    ids = torch.tensor([prompt.token_ids])
    expected = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    assert tokens == expected.tolist()


def test_weights_stay_memory_mapped(checkpoint: Checkpoints) -> None:
    """No weight is copied on load: the tensors lie in the file's own mapping."""
    directory = checkpoint("llama-mha")
    runtime = Runtime.load(directory, threaded=False)
    address = runtime.debug.backend.model.decoder.embedding.data_ptr()  # type: ignore[union-attr]
    with open("/proc/self/maps") as maps:
        mapped = [line.split() for line in maps if str(directory) in line]
    spans = [[int(edge, 16) for edge in line[0].split("-")] for line in mapped]
    assert any(start <= address < end for start, end in spans)
