"""Conversations of several turns: answered as transformers answers them, alone and in an image session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from avl_edge import BadInput, Message, Options, Runtime
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.pixels import stacked

FIRST, SECOND = random_image(1, (90, 70)), random_image(2, (50, 80))
BEFORE = [
    Message("system", "Be brief."),
    Message("user", ["What changes from here", FIRST, "to there?", SECOND]),
    Message("assistant", "A dog came."),
]
OPTIONS = Options(method="full", max_new_tokens=24)


@pytest.fixture
def runtime(checkpoint: Checkpoints) -> Runtime:
    return Runtime.load(checkpoint("mistral-gqa"), threaded=False)


def test_a_conversation_is_answered_as_by_transformers(runtime: Runtime, checkpoint: Checkpoints) -> None:
    generation = runtime.submit(runtime.prepare([FIRST], "And now? </s>", OPTIONS, BEFORE))
    request = runtime.prepare_chat([*BEFORE, Message("user", [FIRST, "And now? </s>"])], OPTIONS)
    assert generation.prompt.token_ids == request.prompt.token_ids
    assert request.prompt.spans[0].digest == request.prompt.spans[2].digest != request.prompt.spans[1].digest
    ids, pixels = torch.tensor([request.prompt.token_ids]), torch.from_numpy(stacked(request.prompt))
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint("mistral-gqa")).eval()
    expected = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=24, do_sample=False)
    assert list(generation.result().token_ids) == expected[0, ids.shape[1] :].tolist()


def test_a_session_takes_turns(runtime: Runtime) -> None:
    """The pictures are in the first turn; what follows them may be several turns."""
    after = [Message("user", "What?"), Message("assistant", "A cat."), Message("user", "And where?")]
    plain = runtime.prepare_chat([*BEFORE, Message("user", [FIRST, "What?"]), *after[1:]], OPTIONS)
    with runtime.open_images([FIRST], OPTIONS, BEFORE) as session:
        question = session.ask(after)
        assert question.prompt.token_ids == plain.prompt.token_ids
        assert question.result().token_ids == runtime.submit(plain).result().token_ids
        shared = session.stats.tokens
    assert shared == plain.prompt.spans[-1].start + plain.prompt.spans[-1].length
    with runtime.open_images([FIRST], OPTIONS) as session:
        for asked, reason in (
            ([Message("user", [FIRST, "What?"])], "shows no pictures: open another session"),
            ([Message("assistant", "Yes.")], "begins with a message of the user"),
            ([], "the prompt is empty"),
        ):
            with pytest.raises(BadInput, match=reason):
                session.prepare(asked)


def test_pictures_shown_before_may_be_those_of_a_session(runtime: Runtime) -> None:
    with runtime.open_images([], OPTIONS, BEFORE) as session:
        answers = [session.ask(asked).result().token_ids for asked in ("Why?", "Where?")]
    assert answers == [runtime.generate([], each, OPTIONS, BEFORE).result().token_ids for each in ("Why?", "Where?")]


def test_what_is_no_conversation_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="must be a list"):
        runtime.prepare_chat("Hi")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="ask something"):
        runtime.prepare_chat(BEFORE)
    with pytest.raises(BadInput, match="does not exist"):
        runtime.prepare_chat([Message("user", [tmp_path / "none.png", "What?"])])
