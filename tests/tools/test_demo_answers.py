"""The shipped model: transformers loads its directory and answers as the runtime does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from avl_edge import Options, Runtime
from avl_edge.model.demo import DEMO
from tests import ROOT
from tools.demo_model.evaluate import MAX_NEW_TOKENS, held_out
from tools.demo_model.scenes import render

SEED = 50


def _pictures(count: int) -> dict[int, str]:
    """``count`` held-out scenes with a question each."""
    return {number: question.text for number, question in held_out(SEED, 4 * count)}


@pytest.mark.parametrize("count", [pytest.param(50, marks=[pytest.mark.slow, pytest.mark.long]), 5])
def test_transformers_gives_the_same_answers(count: int) -> None:
    """Greedy and in the stored bfloat16 on both sides, from the directory as it is shipped.

    Two programs that round differently may part where the two likeliest tokens are equal to within bfloat16: there,
    and only there, transformers' logits decide whether the runtime's token was as good as its own.
    """
    runtime = Runtime.load("demo")
    processor = LlavaProcessor.from_pretrained(DEMO, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(DEMO, dtype=torch.bfloat16).eval()
    pictures = _pictures(count)
    assert len(pictures) == count
    same = 0
    for number, question in pictures.items():
        image = render(number).image
        options = Options(method="full", max_new_tokens=MAX_NEW_TOKENS)
        tokens = list(runtime.generate([image], question, options).result().token_ids)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=image, text=prompt, return_tensors="pt").to(torch.bfloat16)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            answer = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, length:].tolist()
            if tokens == answer:
                same += 1
                continue
            parted = next(i for i, pair in enumerate(zip(tokens, answer, strict=False)) if pair[0] != pair[1])
            ids = torch.cat([inputs["input_ids"], torch.tensor([tokens[:parted]], dtype=torch.int64)], 1)
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1].float()
        gap = (logits.max() - logits[tokens[parted]]).item()
        assert gap <= 2**-7 * logits.abs().max().item(), (number, question, tokens, answer)
    assert same >= 0.9 * count


def test_pictures_of_another_program_are_tried(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.demo_model.foreign", "--json", "--folder", str(tmp_path)]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout)
    assert {row["picture"] for row in rows} == {path.stem for path in tmp_path.iterdir()}
    assert all(set(row) == {"picture", "question", "truth", "said"} for row in rows)
