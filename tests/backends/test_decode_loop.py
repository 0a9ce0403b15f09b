"""Sequences decoded together without a scheduler, against transformers' greedy answers one by one."""

from __future__ import annotations

import torch
from transformers import LlavaForConditionalGeneration

from avl_edge import Options, Runtime
from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.backends.decode_loop import DecodeLoop
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.serving.requests import Request
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.pixels import stacked

STEPS = 6


def _reference(model: LlavaForConditionalGeneration, request: Request) -> list[int]:
    ids, prompt = list(request.prompt.token_ids), request.prompt
    pixels = None if prompt.pixel_values is None else torch.from_numpy(stacked(prompt))
    for _ in range(STEPS):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_sequences_are_decoded_together(checkpoint: Checkpoints) -> None:
    directory = checkpoint("mistral-gqa")
    options, runtime = Options(method="full", max_new_tokens=STEPS), Runtime.open(directory)
    asked = [([random_image(3, (120, 80))], "What is it?"), ([], "How many are there?")]
    requests = [runtime.prepare(images, prompt, options) for images, prompt in asked]
    model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    expected = [_reference(model, request) for request in requests]

    network = VisionLanguageModel(read_spec(directory), load_weights(directory))
    pages = sum(request.plan.pages for request in requests)
    with DecodeLoop(TorchBackend.with_pages(network, pages)) as loop:
        logits = [loop.prefill(each.prompt, loop.encode(each.prompt), each.plan) for each in requests]
        answers = [[int(own.argmax())] for own in logits]
        for step in range(1, STEPS):
            newest = [tokens[-1] for tokens in answers]
            chosen = loop.decode(newest).argmax(-1).tolist() if step % 2 else loop.decode_greedy(newest)
            for tokens, token in zip(answers, chosen, strict=True):
                tokens.append(token)
        assert answers == expected
        assert loop.pool.bytes_in_use > 0
    loop.pool.check_integrity([])
    assert loop.pool.bytes_in_use == 0
