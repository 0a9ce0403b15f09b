"""Perplexity, KL and agreement on texts, against transformers and float64 formulas."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from avl_edge.backends.cpu.backend import TorchBackend
from avl_edge.backends.decode_loop import DecodeLoop
from avl_edge.config import PromptShape
from avl_edge.errors import BadInput
from avl_edge.measure.evaluate import REFERENCE, Setting
from avl_edge.measure.perplexity import HEADER, Window, WindowLayout, measure, plans_of, read_windows, report
from avl_edge.measure.perplexity.report import perplexity
from avl_edge.model.checkpoint import load_weights
from avl_edge.model.families import read_spec
from avl_edge.model.prompt import Processor
from avl_edge.model.prompt.text_tokenizer import TextTokenizer
from avl_edge.model.vision_language import VisionLanguageModel
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import CORPUS

LAYOUT = WindowLayout(40, 12)
INT8, INT4 = Setting("full:format=int8"), Setting("full:format=int4")


@pytest.fixture(scope="module")
def directory(checkpoint: Checkpoints) -> Path:
    """Qwen2: biases on q, k and v."""
    return checkpoint("qwen2-gqa")


@pytest.fixture(scope="module")
def model(directory: Path) -> VisionLanguageModel:
    return VisionLanguageModel(read_spec(directory), load_weights(directory))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> TextTokenizer:
    return Processor.of(read_spec(directory), directory).text


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    texts = {"one.txt": " ".join(CORPUS), "two.txt": "\n".join(reversed(CORPUS))}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


@pytest.fixture(scope="module")
def windows(files: list[Path], tokenizer: TextTokenizer) -> list[Window]:
    return read_windows(files, tokenizer, LAYOUT, 2)


def transformers_log_probabilities(directory: Path, window: Window, first: int) -> npt.NDArray[np.float64]:
    """Of the tokens from ``first`` on, float64 ``[tokens, vocabulary]``, by one forward pass."""
    reference = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = reference(torch.tensor([window.token_ids])).logits[0, first - 1 : -1].numpy()
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def test_perplexity_of_full_attention_is_that_of_transformers(
    model: VisionLanguageModel, windows: list[Window], directory: Path
) -> None:
    plans, _ = plans_of([], LAYOUT, model.spec.text.kv_shape(4))
    scores = measure(model, windows, LAYOUT, plans)[REFERENCE]
    expected = []
    for window in windows:
        predicted = transformers_log_probabilities(directory, window, LAYOUT.prompt)
        expected += [-predicted[at, token] for at, token in enumerate(window.token_ids[LAYOUT.prompt :])]
    assert perplexity(scores.negative_log_likelihood) == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    np.testing.assert_allclose(scores.negative_log_likelihood.flatten(), expected, atol=1e-4)


def test_a_text_held_as_an_image_is_still_that_text(
    model: VisionLanguageModel, windows: list[Window], directory: Path
) -> None:
    layout = WindowLayout(40, 30, 10)
    plans, _ = plans_of([Setting("coarse:core=100:mass=100")], layout, model.spec.text.kv_shape(4))
    assert len(plans) == 2  # with an image coarse has something to decide
    for scores in measure(model, windows[:1], layout, plans).values():
        predicted = transformers_log_probabilities(directory, windows[0], layout.prompt)
        expected = [-predicted[at, token] for at, token in enumerate(windows[0].token_ids[layout.prompt :])]
        np.testing.assert_allclose(scores.negative_log_likelihood[0], expected, atol=1e-4)


def test_kl_and_agreement_are_their_definitions(model: VisionLanguageModel, windows: list[Window]) -> None:
    """Each setting alone, one window at a time, and numpy's float64."""
    shape = model.spec.text.kv_shape(4)
    plans, _ = plans_of([INT4], LAYOUT, shape)
    scores = measure(model, windows, LAYOUT, plans)[INT4]
    for number, window in enumerate(windows):
        logits = {}
        for setting, plan in plans.items():
            with DecodeLoop(TorchBackend.with_pages(model, plan.pages)) as loop:
                steps = [loop.prefill(window.prompt(LAYOUT), None, plan)]
                steps += [loop.decode([token])[0] for token in window.token_ids[LAYOUT.prompt : -1]]
            logits[setting] = torch.stack(steps).double().numpy()
        p, q = (np.exp(each) / np.exp(each).sum(-1, keepdims=True) for each in (logits[REFERENCE], logits[INT4]))
        np.testing.assert_allclose(scores.kl[number], (p * np.log(p / q)).sum(-1), atol=1e-6)
        np.testing.assert_array_equal(scores.same[number], p.argmax(-1) == q.argmax(-1))


def test_the_same_setting_has_no_distance_and_a_smaller_format_a_larger_one(
    model: VisionLanguageModel, windows: list[Window]
) -> None:
    shape = model.spec.text.kv_shape(4)
    exact = Setting("full:format=exact")
    plans, left_out = plans_of([INT8, INT4, exact], LAYOUT, shape)
    scores = measure(model, windows, LAYOUT, plans)
    assert not left_out
    assert scores[exact].kl.max() < 1e-9
    assert scores[exact].same.all()
    assert 1e-9 < scores[INT8].kl.mean() < scores[INT4].kl.mean() / 10
    document = report(windows, LAYOUT, scores, left_out)
    rows = {row["method"]: row for row in document["results"]}
    assert rows["full"]["perplexity_change"] == 0
    assert rows["full"]["bytes_per_row"] == shape.row_bytes
    assert rows["full:format=int4"]["bytes_stored_fraction"] < rows["full:format=int8"]["bytes_stored_fraction"] < 1
    assert document["tokens"] == 4 * 28
    assert [text["name"] for text in document["texts"]] == ["one.txt", "two.txt"]
    product = np.prod(list(rows["full"]["by_text"].values()))  # two texts of as many tokens
    assert rows["full"]["perplexity"] == pytest.approx(math.sqrt(product))


def test_methods_that_leave_out_text_are_judged_and_others_said_to_decide_nothing(
    model: VisionLanguageModel, windows: list[Window]
) -> None:
    shape = model.spec.text.kv_shape(4)
    deciding = [Setting("h2o:grow=1", 0.5), Setting("streaming:window=8"), Setting("avl:text_keep=50:text_floor=4")]
    idle = [Setting(name) for name in ("coarse", "distinct:format=int4", "fastv")]
    plans, left_out = plans_of([*deciding, *idle, Setting("full", 0.5)], LAYOUT, shape)
    assert list(plans) == [REFERENCE, *deciding]
    assert all("--as-image" in left_out[setting] for setting in idle)
    assert "cannot hold this prompt in 50 %" in left_out[Setting("full", 0.5)]
    scores = measure(model, windows[:1], LAYOUT, plans)
    assert all(scores[setting].kl.mean() > 1e-4 for setting in deciding)
    assert all(scores[setting].bytes_stored < scores[setting].bytes_full for setting in deciding)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 60))
def test_a_layout_has_room_for_its_parts_or_is_refused(length: int, prompt: int, image: int) -> None:
    fits = prompt < length and (image == 0 or HEADER + image < prompt)
    if not fits:
        with pytest.raises(BadInput):
            WindowLayout(length, prompt, image)
        return
    layout = WindowLayout(length, prompt, image)
    assert layout.predicted + layout.shape.length == length
    header = HEADER if image else prompt
    assert layout.shape == PromptShape(header, image, prompt - header - image)


def test_windows_are_the_texts_own_tokens_in_order(files: list[Path], checkpoint: Checkpoints, directory: Path) -> None:
    for model in (directory, checkpoint("llama-mha")):  # LLaMA's tokenizer begins every text with a token of its own
        tokenizer = Processor.of(read_spec(model), model).text
        first, second = read_windows(files[:1], tokenizer, LAYOUT, 2)
        begin = tokenizer.encode("")
        ids = tokenizer.tokenizer.encode(files[0].read_text(), add_special_tokens=False).ids
        assert [*first.token_ids[len(begin) :], *second.token_ids[len(begin) :]] == ids[: 2 * (40 - len(begin))]
        assert first.token_ids[: len(begin)] == second.token_ids[: len(begin)] == begin


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a\0b" * 100, "is not UTF-8 text"),
        (b"too short", "tokens, which are fewer than 1 x 40"),
        (b"What is shown in this <image> image?" * 9, "contains <image>"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, tokenizer: TextTokenizer, content: bytes, message: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_windows([file], tokenizer, LAYOUT, 1)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    for file in (tmp_path / "missing", tmp_path):
        with pytest.raises(BadInput, match="cannot be read"):
            read_windows([file], tokenizer, LAYOUT, 1)
    with pytest.raises(BadInput, match="there is no text"):
        read_windows([], tokenizer, LAYOUT, 1)
