"""The demo model: its arithmetic is PyTorch's own, and transformers reads its export alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avl_edge.model.demo import DEMO
from tests.equipment.demo_model import TOKENIZER
from tools.demo_model import scenes
from tools.demo_model.canvas import PATCH
from tools.demo_model.config import ModelConfig
from tools.demo_model.data import IGNORE, head_ids, pack
from tools.demo_model.export import read_checkpoint, write
from tools.demo_model.fast import attention, rms_norm
from tools.demo_model.model import DemoModel, Packing, question_mask
from tools.demo_model.questions import Question
from tools.demo_model.vision import patches


class TestFast:
    """The written-out gradients are those of PyTorch's own operations."""

    def test_attention(self) -> None:
        q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
        bias = torch.zeros(5, 7, dtype=torch.float64)
        bias[:, 4] = -1e4
        own = attention(q, k, v, bias)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        _same_with_gradients(own, expected, (q, k, v))

    def test_rms_norm(self) -> None:
        x = torch.randn(2, 5, 16, requires_grad=True)
        weight = torch.rand(16, requires_grad=True)
        _same_with_gradients(
            rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (16,), weight, 1e-5), (x, weight)
        )

    def test_a_question_sees_the_picture_and_itself_only(self) -> None:
        mask = question_mask(torch.tensor([[0, 0, 1, -1]]), 3, torch.float32)[0, 0] == 0
        assert mask[:, :3].all()
        assert mask[:3, 3:].tolist() == [
            [True, False, False, False],
            [True, True, False, False],
            [False, False, True, False],
        ]


def _same_with_gradients(own: torch.Tensor, expected: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(own, expected)
    upstream = torch.randn_like(own)
    pairs = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (own, expected))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


class TestPatches:
    def test_showing_every_patch_is_showing_the_picture(self) -> None:
        torch.manual_seed(0)
        model = DemoModel(ModelConfig(vision_width=32, vision_layers=1, vision_heads=1, width=32, heads=1, layers=2))
        features, rows = torch.randn(2, 576, 32), torch.arange(6).view(2, 3)
        text, head = Packing(rows, torch.zeros_like(rows), rows % 3), torch.tensor([[1, 2]])
        every = torch.arange(576).expand(2, -1)
        expected = model.read(features, head, text, model.all_layers)
        torch.testing.assert_close(model.read(features, head, text, model.all_layers, every), expected)


class TestExport:
    def test_transformers_gives_the_same_logits(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        write(read_checkpoint(DEMO), DEMO / "tokenizer.json", tmp_path / "model")
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
        processor = transformers.LlavaProcessor.from_pretrained(tmp_path / "model", backend="pil")
        own = read_checkpoint(tmp_path / "model")
        image = scenes.render(scenes.EXAMPLE_SEEDS.start + 9).image
        question = Question("speed", "How fast are we?", "87 km/h")
        expected = _transformers_logits(theirs, processor, image, question)
        actual = _own_logits(own, image, question)
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)

    def test_preprocessing_leaves_the_pixels(self) -> None:
        transformers = pytest.importorskip("transformers")
        processor = transformers.LlavaProcessor.from_pretrained(DEMO, backend="pil")
        image = scenes.render(3).image
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        own = patches(torch.from_numpy(np.array(image))[None])
        first = pixels[0, :, :PATCH, PATCH : 2 * PATCH].reshape(-1)
        torch.testing.assert_close(own[0, 1], first, atol=1e-5, rtol=0)

    def test_files_are_small_enough_to_ship(self) -> None:
        sizes = [file.stat().st_size for file in DEMO.iterdir()]
        assert max(sizes) <= 16 * 2**20
        assert sum(sizes) <= 32 * 2**20


@torch.no_grad()
def _transformers_logits(model, processor, image: Image.Image, question: Question) -> torch.Tensor:
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=f"{prompt} {question.answer}", return_tensors="pt")
    answer = len(processor.tokenizer(f" {question.answer}", add_special_tokens=False).input_ids)
    return model(**inputs).logits[0, -answer - 1 :]


@torch.no_grad()
def _own_logits(model, image: Image.Image, question: Question) -> torch.Tensor:
    packed = pack([question], TOKENIZER, 64)
    rows = (torch.from_numpy(a)[None] for a in (packed.ids, packed.segments, packed.positions))
    features = model.vision_tower(torch.from_numpy(np.array(image))[None])
    states = model.read(features, torch.tensor([head_ids(TOKENIZER)]), Packing(*rows), model.all_layers)
    return model.lm_head(states[torch.from_numpy(packed.targets)[None] != IGNORE])
