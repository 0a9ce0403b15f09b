"""A checkpoint made from a GGUF file computes what transformers computes from the same file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

from avl_edge import Options, Runtime
from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.backends.decode_loop import DecodeLoop
from avl_edge.config import Formats
from avl_edge.errors import BadInput
from avl_edge.kv.budget import kv_plan
from avl_edge.kv.cache import prompt_shape
from avl_edge.kv.methods import Full
from avl_edge.model.checkpoint import load_weights, stored_dtype
from avl_edge.model.families import read_spec
from avl_edge.model.prompt import Processor
from avl_edge.model.vision_language import VisionLanguageModel
from avl_edge.request import Prompt
from tests import ROOT
from tests.equipment.checkpoints import TOKENIZER_SIZE, random_image
from tests.equipment.gguf_files import write_decoder
from tools import real_decoder
from tools.real_decoder import make_checkpoint

TEXT = "Describe the picture in detail: a red bicycle leans on the wall of an old bakery, near two people."
PROMPT = 5  # tokens; the rest are decode steps


@pytest.fixture(scope="module")
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="GGUF files are written with the package gguf")


def our_logits(directory: Path, ids: list[int]) -> Tensor:
    """From the prompt's last token on, ``[tokens, vocabulary]``, by prefill and decode steps."""
    spec = read_spec(directory)
    model = VisionLanguageModel(spec, load_weights(directory))
    shape = spec.text.kv_shape(model.dtype.itemsize)
    plan = kv_plan(Full(), Formats(), shape, prompt_shape(PROMPT, ()), len(ids) - PROMPT)
    with DecodeLoop(TorchBackend.with_pages(model, plan.pages)) as loop:
        logits = [loop.prefill(Prompt(tuple(ids[:PROMPT]), (), None), None, plan)]
        return torch.stack(logits + [loop.decode([token])[0] for token in ids[PROMPT:]])


@pytest.mark.parametrize(("architecture", "tied"), [("qwen2", False), ("qwen2", True), ("llama", False)])
def test_the_checkpoint_computes_what_transformers_reads_from_the_file(
    gguf: Any, tmp_path: Path, architecture: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_decoder, "SHARD_BYTES", 100_000)  # several files
    file = write_decoder(gguf, tmp_path / "small.gguf", architecture, tied=tied)
    directory = tmp_path / "checkpoint"
    make_checkpoint(file, directory, torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ids = tokenizer(TEXT).input_ids
    processor = Processor.of(read_spec(directory), directory)
    assert list(processor.text.encode(TEXT)) == ids
    assert processor.eos_token_ids == {tokenizer.eos_token_id}

    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0, PROMPT - 1 :]
    logits = our_logits(directory, ids)
    torch.testing.assert_close(logits[:, :TOKENIZER_SIZE], expected, rtol=0, atol=1e-4)
    assert not logits[:, TOKENIZER_SIZE:].any()  # the rows that the vocabulary was padded with


def test_transformers_reads_the_checkpoint_and_pictures_are_answered(gguf: Any, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    make_checkpoint(write_decoder(gguf, tmp_path / "small.gguf", "qwen2"), directory, torch.float32)
    model, report = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    assert str(tmp_path) not in "".join(path.read_text() for path in directory.glob("*.json"))
    ids = Processor.of(read_spec(directory), directory).text.encode(TEXT)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids])).logits[0, PROMPT - 1 :]
    torch.testing.assert_close(our_logits(directory, list(ids)), expected, rtol=0, atol=1e-4)
    result = Runtime.load(directory).generate([random_image(1, 64)], "What is it?", Options(max_new_tokens=3)).result()
    assert len(result.token_ids) == 3


def test_the_program_writes_the_asked_dtype(gguf: Any, tmp_path: Path) -> None:
    file = write_decoder(gguf, tmp_path / "small.gguf", "llama")
    done = run(str(file), str(tmp_path / "checkpoint"), "--dtype", "bfloat16")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert stored_dtype(tmp_path / "checkpoint") == torch.bfloat16
    again = run(str(file), str(tmp_path / "checkpoint"))
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "is there already" in again.stderr


def test_a_file_that_is_no_use_is_refused_in_one_line(gguf: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"a picture")
    with pytest.raises(BadInput, match=r"other\.gguf is not a GGUF file"):
        make_checkpoint(other, tmp_path / "checkpoint", torch.float32)
    with pytest.raises(BadInput, match=r"missing\.gguf cannot be read"):
        make_checkpoint(tmp_path / "missing.gguf", tmp_path / "checkpoint", torch.float32)
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadInput, match="architecture 'bert': only llama, qwen2 are read"):
        make_checkpoint(tmp_path / "bert.gguf", tmp_path / "checkpoint", torch.float32)
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadInput, match=r"has no llama\.block_count: is it a complete model"):
        make_checkpoint(tmp_path / "empty.gguf", tmp_path / "checkpoint", torch.float32)
    whole = write_decoder(gguf, tmp_path / "small.gguf", "qwen2").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"cut\.gguf is damaged or cut off"):
        make_checkpoint(tmp_path / "cut.gguf", tmp_path / "checkpoint", torch.float32)
    assert not (tmp_path / "checkpoint").exists()


def test_tensors_that_the_model_would_compute_without_are_refused(gguf: Any, tmp_path: Path) -> None:
    file = write_decoder(gguf, tmp_path / "small.gguf", "llama", extra="rope_freqs.weight")
    with pytest.raises(BadInput, match=r"has tensors that .* rope_freqs\.weight"):
        make_checkpoint(file, tmp_path / "checkpoint", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_without_gguf_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadInput, match="pip install gguf"):
        make_checkpoint(tmp_path / "any.gguf", tmp_path / "checkpoint", torch.float32)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.real_decoder", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
