"""What rounded weights cost: the runtime's own evaluation of the checkpoint that they make."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from avl_edge.errors import BadInput
from avl_edge.measure.evaluate import REFERENCE
from avl_edge.measure.perplexity import WindowLayout, measure, plans_of, read_windows
from avl_edge.measure.perplexity.report import perplexity
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec
from avl_edge.model.prompt import Processor
from avl_edge.model.vision_language import VisionLanguageModel
from tests import ROOT
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import CORPUS
from tools.quantised_weights import make_checkpoint
from tools.weight_perplexity import evaluate, rounded

LAYOUT = WindowLayout(60, 20)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(CORPUS * 3))
    return file


def test_figures_are_those_of_the_checkpoint_with_rounded_weights(
    checkpoint: Checkpoints, text: Path, tmp_path: Path
) -> None:
    source, directory = checkpoint("qwen2-gqa"), tmp_path / "int4"
    make_checkpoint(source, directory, 7, 16)
    windows = read_windows([text], Processor.of(read_spec(source), source).text, LAYOUT, 1)
    rows = evaluate(source, windows, LAYOUT, ["int4"], 16, None)
    logits = []
    for row, made in zip(rows, (source, directory), strict=True):
        model = VisionLanguageModel(read_spec(made), load_weights(made))
        plans, _ = plans_of([], LAYOUT, model.spec.text.kv_shape(4))
        scores = measure(model, windows, LAYOUT, plans)[REFERENCE]
        assert row["perplexity"] == pytest.approx(perplexity(scores.negative_log_likelihood), rel=1e-4)
        reference = LlavaForConditionalGeneration.from_pretrained(made, dtype=torch.float64).eval()
        with torch.no_grad():
            found = reference(torch.tensor([windows[0].token_ids])).logits[0, LAYOUT.prompt - 1 : -1].numpy()
        logits.append(found)
    p, q = (np.exp(each) / np.exp(each).sum(-1, keepdims=True) for each in logits)
    assert rows[0]["kl"] == 0
    assert rows[1]["kl"] == pytest.approx((p * np.log(p / q)).sum(-1).mean(), abs=1e-6)
    assert rows[1]["same_token"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert rows[1]["perplexity_change"] == pytest.approx(rows[1]["perplexity"] / rows[0]["perplexity"] - 1)
    assert math.isfinite(rows[1]["perplexity"])


def test_variants_that_there_are_not_are_refused(checkpoint: Checkpoints) -> None:
    for variant in ("int3", "int4+aware+tail", ""):
        with pytest.raises(BadInput, match="there are no weights"):
            rounded(checkpoint("qwen2-gqa"), variant, 16, None)
    with pytest.raises(BadInput, match=r"int4\+aware needs a text"):
        rounded(checkpoint("qwen2-gqa"), "int4+aware", 16, None)


def test_the_program_prints_one_document(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    options = ["--model", str(checkpoint("qwen2-gqa")), "--data", f"text:{text}", "--weights", "int8,int4+aware+head"]
    sizes = ["--group", "16", "--window", "60", "--prompt-tokens", "20", "--calibration", str(text)]
    command = [sys.executable, "-m", "tools.weight_perplexity", *options, *sizes, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "out.json").read_text())
    assert [row["weights"] for row in document["results"]] == ["", "int8", "int4+aware+head"]
    assert (document["tokens"], document["group"]) == (40, 16)
