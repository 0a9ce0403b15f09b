"""What packed values cost: the code is the row formats', the figures are those of a decoder with such values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from avl_edge.errors import BadInput
from avl_edge.kv.formats import decode, encode
from avl_edge.kv.layout import Format
from avl_edge.measure.perplexity import WindowLayout, read_windows
from avl_edge.model.families import read_spec
from avl_edge.model.prompt import Processor
from tests import ROOT
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import CORPUS
from tools.value_perplexity import evaluate, hadamard, packed, through

LAYOUT = WindowLayout(60, 20)
HEADS, DIM = 2, 16  # of qwen2-gqa


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(CORPUS * 3))
    return file


def in_int4(values: Tensor) -> Tensor:
    rows = values.reshape(-1, HEADS, DIM)
    return decode(Format("int4"), encode(Format("int4"), rows), HEADS, DIM).view_as(values)


class PackedValues(nn.Module):
    """A projection of which the row format's own values come back."""

    def __init__(self, projection: Any) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, hidden: Tensor) -> Tensor:
        return in_int4(self.projection(hidden))


def test_four_bits_are_the_row_format() -> None:
    values = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0))
    ours = decode(Format("int4"), encode(Format("int4"), values), 3, 64)
    assert torch.equal(packed(values, 4, 32), ours)


def test_what_is_done_before_is_undone() -> None:
    """With so many bits that nothing is lost, and without a constant in a channel either way."""
    values = torch.randn(30, 2, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 16) + 3
    for variant in ("8+hadamard", "8+smooth", "8+hadamard+smooth+group8"):
        assert (through(variant, 20)(values) - values).abs().max() < 0.02 * values.abs().max()
    matrix = hadamard(16)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16))
    assert set(matrix.mul(4).flatten().tolist()) == {-1.0, 1.0}


def test_figures_are_those_of_a_decoder_with_such_values(checkpoint: Checkpoints, text: Path) -> None:
    directory = checkpoint("qwen2-gqa")
    windows = read_windows([text], Processor.of(read_spec(directory), directory).text, LAYOUT, 1)
    rows = evaluate(directory, windows, LAYOUT, ["4", "2", "4"])
    assert [row["values"] for row in rows] == ["", "4", "2", "4"]
    found = []
    for packs in (False, True):
        model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
        for layer in model.model.language_model.layers if packs else ():
            layer.self_attn.v_proj = PackedValues(layer.self_attn.v_proj)
        with torch.no_grad():
            logits = model(torch.tensor([windows[0].token_ids])).logits[0, LAYOUT.prompt - 1 : -1].double().numpy()
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    exact, own = found
    targets = np.array(windows[0].token_ids[LAYOUT.prompt :])
    for row, each in zip(rows, found, strict=False):
        assert row["perplexity"] == pytest.approx(np.exp(-each[np.arange(len(targets)), targets].mean()), rel=1e-5)
    assert rows[1]["kl"] == pytest.approx((np.exp(exact) * (exact - own)).sum(-1).mean(), abs=1e-6)
    assert rows[3] == rows[1], "what one variant did to the model is undone for the next"
    assert rows[2]["kl"] > 4 * rows[1]["kl"] > 0


@pytest.mark.parametrize(
    "variant", ["", "1", "9", "four", "4+", "4+turn", "4+group", "4+group8+group8", "4+smooth+smooth"]
)
def test_what_is_no_variant_is_refused(variant: str) -> None:
    with pytest.raises(BadInput, match="give bits from 2 to 8"):
        through(variant, 1)


def test_the_program(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    options = ["--model", str(checkpoint("qwen2-gqa")), "--data", f"text:{text}", "--window", "60"]
    command = [sys.executable, "-m", "tools.value_perplexity", *options, "--prompt-tokens", "20"]
    out = tmp_path / "out.json"
    process = subprocess.run([*command, "--values", "3", "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    document = json.loads(out.read_text())
    assert [row["values"] for row in document["results"]] == ["", "3"]
    assert document["tokens"] == 40
    wrong = subprocess.run([*command, "--values", "4+group7"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.endswith("\nvalue_perplexity: heads of 16 have no groups of 7\n")
    assert "Traceback" not in wrong.stderr
