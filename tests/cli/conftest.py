"""A small model and a picture for commands, and `avl-edge run` on them."""

from __future__ import annotations

import pytest

from avl_edge.cli import run_app
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.command_line import PROMPT, Outcome


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoints) -> str:
    return str(checkpoint("mistral-gqa"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "cam.jpg"
    random_image(5, (120, 90)).save(path)
    return str(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], model: str, picture: str):  # type: ignore[no-untyped-def]
    """``run(*options)`` on the small model; ``image`` and ``prompt`` may be replaced or left out with None."""

    def call(*options: str, image: str | None = picture, prompt: str | None = PROMPT, model: str = model) -> Outcome:
        arguments = ["run", "--model", model, *options]
        arguments += [] if image is None else ["--image", image]
        arguments += [] if prompt is None else ["--prompt", prompt]
        code = run_app(arguments)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
