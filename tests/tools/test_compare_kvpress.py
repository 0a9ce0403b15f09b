"""The comparison with kvpress: nothing is lost where nothing is compressed, and what is held is what was asked for."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avl_edge import BadInput, Options, Runtime
from avl_edge.measure.evaluate import Setting, read_questions, settings_of
from avl_edge.request import Prompt, Result
from tests.conftest import Checkpoints
from tests.equipment import oracle_baselines as oracles
from tests.equipment.checkpoints import random_image
from tests.equipment.oracle import load_model, top
from tests.equipment.pixels import stacked
from tools.compare_kvpress import Comparison, press_settings
from tools.kvpress_peer import PRESSES, Peer, Press, load_kvpress, ratio_of, rows_of

STEPS = 24
PROMPT = "What is shown in the picture, and how many boats are there?"
NOTATIONS = ["observed", "snapkv:window_size=4", "tova", "streaming", "expected:n_future_positions=32"]


@pytest.fixture(scope="module")
def kvpress() -> Any:
    try:
        return load_kvpress()
    except BadInput as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def directory(checkpoint: Checkpoints) -> Path:
    """A checkpoint in float32, where rounding decides nothing; heads of queries share keys."""
    return checkpoint("mistral-gqa")


@pytest.fixture(scope="module")
def peer(directory: Path) -> Peer:
    return Peer(directory, torch.float32)


@pytest.fixture(scope="module")
def full(directory: Path) -> list[tuple[Prompt, Result]]:
    """Prompts about different pictures, with what full attention answers."""
    runtime, options = Runtime.load(directory), Options(method="full", max_new_tokens=STEPS)
    requests = [runtime.prepare([random_image(seed, (90, 70))], PROMPT, options) for seed in (1, 2, 3)]
    return [(request.prompt, runtime.submit(request).result()) for request in requests]


@pytest.fixture(scope="module")
def prompt(full: list[tuple[Prompt, Result]]) -> Prompt:
    return full[0][0]


def test_transformers_alone_answers_as_full_attention(peer: Peer, full: list[tuple[Prompt, Result]]) -> None:
    for prompt, result in full:
        reply = peer.answer(prompt, None, STEPS)
        assert reply.token_ids == result.token_ids
        assert reply.text == result.text.strip()
        assert set(reply.prompt_rows) == {len(prompt)}


@pytest.mark.parametrize("notation", NOTATIONS)
def test_a_press_that_keeps_everything_changes_nothing(
    kvpress: Any, peer: Peer, full: list[tuple[Prompt, Result]], notation: str
) -> None:
    prompt, result = full[0]
    press = Press.read(kvpress, notation).at(rows_of(1.0, len(prompt)), len(prompt))
    assert press.compression_ratio == 0
    assert peer.answer(prompt, press, STEPS).token_ids == result.token_ids


@pytest.mark.parametrize("share", [0.5, 0.3, 0.125])
@pytest.mark.parametrize("notation", NOTATIONS)
def test_the_cache_holds_the_share_that_was_asked_for(
    kvpress: Any, directory: Path, peer: Peer, prompt: Prompt, notation: str, share: float
) -> None:
    """In every layer and head, at the end of the prompt; then each step but the last, whose token is not fed, adds a
    row to each."""
    shape = Runtime.open(directory).kv_shape
    rows = int(share * 1000) * len(prompt) // 1000
    reply = peer.answer(prompt, Press.read(kvpress, notation).at(rows_of(share, len(prompt)), len(prompt)), STEPS)
    assert reply.prompt_rows == (rows,) * shape.layers
    assert reply.prompt_elements * shape.itemsize == rows * shape.layers * shape.row_bytes
    steps = len(reply.token_ids) - 1
    assert reply.end_elements * shape.itemsize == (rows + steps) * shape.layers * shape.row_bytes
    assert reply.read_fraction(len(prompt)) == pytest.approx(
        sum(rows + step for step in range(1, steps + 1)) / sum(len(prompt) + step for step in range(1, steps + 1))
    )


@given(st.integers(1, 5000), st.integers(1, 1000))
def test_a_ratio_keeps_the_rows_that_it_stands_for(length: int, thousandths: int) -> None:
    """By the formula of kvpress' presses, also where the share is no binary number."""
    rows = rows_of(thousandths / 1000, length)
    assert rows == max(1, thousandths * length // 1000)
    ratio = ratio_of(rows, length)
    assert 0 <= ratio < 1
    assert max(1, int(length * (1 - ratio))) == rows


@pytest.mark.usefixtures("kvpress")
def test_that_formula_is_kvpress_own() -> None:
    compute = importlib.import_module("kvpress.utils").compute_n_kept
    for length in range(1, 700, 7):
        for rows in range(1, length + 1, 5):
            assert compute(length, ratio_of(rows, length)) == rows


def _kept_by_streaming(rows: list[int], count: int, _weights: torch.Tensor) -> list[int]:
    return rows[:4] + rows[len(rows) - (count - 4) :]


def _kept_by_tova(rows: list[int], count: int, weights: torch.Tensor) -> list[int]:
    return [*top(weights[-1].tolist(), rows[:-1], count - 1), rows[-1]]


@pytest.mark.parametrize(("notation", "kept"), [("streaming", _kept_by_streaming), ("tova", _kept_by_tova)])
def test_a_press_answers_as_a_full_cache_behind_masks(
    kvpress: Any,
    directory: Path,
    full: list[tuple[Prompt, Result]],
    notation: str,
    kept: Callable[[list[int], int, torch.Tensor], list[int]],
) -> None:
    """The oracle evicts nothing and hides rows: so steps go on at the prompt's positions, and see what was kept."""
    prompt, result = full[0]
    rows = rows_of(0.25, len(prompt))
    pixels = torch.from_numpy(stacked(prompt)).double()
    case = oracles.Case(load_model(directory), list(prompt.token_ids), pixels, STEPS)
    truth = oracles.answer(
        case,
        [case.causal] * case.depth,
        [list(range(len(prompt)))] * case.depth,
        lambda _layer, step, held, weights: held if step else kept(held, rows, weights),
    )
    press = Press.read(kvpress, notation).at(rows, len(prompt))
    reply = Peer(directory, torch.float64).answer(prompt, press, STEPS)
    assert reply.token_ids == tuple(step.token for step in truth)
    assert reply.token_ids != result.token_ids, "the rows that are gone should have been missed"


def test_the_document_has_both_sides(kvpress: Any, directory: Path, peer: Peer, tmp_path: Path) -> None:
    random_image(1, (90, 70)).save(tmp_path / "a.png")
    asked = [{"image": "a.png", "question": text, "answers": ["two"]} for text in (PROMPT, PROMPT + " And now?")]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, asked)))
    questions = read_questions(str(tmp_path / "q.jsonl"), 0, None, tmp_path)
    presses = press_settings(kvpress, ["tova", "snapkv:window_size=20"], [0.5, 0.25])
    comparison = Comparison(Runtime.load(directory), peer, settings_of(["full", "h2o"], [0.5]), presses, STEPS)
    document = comparison.run(questions)
    rows = {Setting(row["method"], row["kv_fraction"]): row for row in document["results"]}
    left_out = {Setting(row["method"], row["kv_fraction"]) for row in document["unreachable"]}
    assert left_out == {Setting("kvpress:snapkv:window_size=20", 0.25)}, "20 rows are more than the share has"
    assert rows.keys() | left_out == {*comparison.methods, *presses}
    assert rows[Setting("full")]["bytes_prompt_fraction"] == rows[Setting("transformers")]["bytes_prompt_fraction"] == 1
    assert rows[Setting("transformers")]["token_identity"] == 1
    assert rows[Setting("transformers")]["bytes_stored"] == rows[Setting("full")]["bytes_stored"]
    for share in (0.5, 0.25):
        assert share - 0.05 < rows[Setting("kvpress:tova", share)]["bytes_prompt_fraction"] <= share
    assert all(row["questions"] == 2 and "ms_per_token" not in row for row in rows.values())


def test_what_is_no_press_is_refused(kvpress: Any) -> None:
    for notation in ("h3o", "tova:window_size=4", "snapkv:format=int4"):
        with pytest.raises(BadInput, match=notation):
            Press.read(kvpress, notation)
    assert all(hasattr(kvpress, name) for name in PRESSES.values())


def test_a_missing_kvpress_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(BadInput) as caught:
        load_kvpress()
    message = str(caught.value)
    assert "pip install --no-deps kvpress" in message
    assert "\n" not in message


@pytest.mark.usefixtures("kvpress")
def test_transformers_keeps_its_own_attention() -> None:
    """Importing kvpress wraps it; the other tests, and the row without a press, are about transformers as it is."""
    functions = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    assert not any(function.__module__.startswith("kvpress") for function in functions.values())
