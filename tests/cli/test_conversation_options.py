"""`--system` and `--history` of `avl-edge run`."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from avl_edge import Frames, Message, Options, Runtime
from avl_edge.cli import run_app
from tests.conftest import Checkpoints
from tests.equipment.checkpoints import random_image
from tests.equipment.command_line import PROMPT


def _history(directory: Path, content: Any) -> str:
    path = directory / "said.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_what_was_said_before_reaches_the_model(run, tmp_path: Path, model: str, picture: str) -> None:  # type: ignore[no-untyped-def]
    shutil.copy(picture, tmp_path / "cam.jpg")
    encoded = base64.b64encode(Path(picture).read_bytes()).decode()
    said = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}},
                {"type": "text", "text": "What is it?"},
                {"type": "image", "image": "cam.jpg"},
            ],
        },
        {"role": "assistant", "content": "A boat."},
    ]
    options = ["--history", _history(tmp_path, said), "--system", "Be brief.", "--max-new-tokens", "8", "--json"]
    document = json.loads(run(*options).out)
    shown = [Path(picture), "What is it?", Path(picture)]
    before = [Message("system", "Be brief."), Message("user", shown), Message("assistant", "A boat.")]
    runtime = Runtime.load(model, threaded=False)
    expected = runtime.generate([Path(picture)], PROMPT, Options(max_new_tokens=8), before).result()
    assert document["token_ids"] == list(expected.token_ids)
    assert document["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    several = json.loads(run(*options, "--prompt", "Why?", image=None).out)
    assert len(several["answers"]) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        ({"role": "user"}, "must be a list"),
        (["Hi"], "message 1 of --history must have"),
        ([{"role": "user", "content": 3}], "must be a text or a list of parts, not 3"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part of message 1"),
        ([{"role": "user", "content": [{"type": "image", "image": "http://a/b.png"}]}], "is an address"),
        ([{"role": "user", "content": [{"type": "image", "image": "data:image/png,x"}]}], "of valid base64"),
        ([{"role": "tool", "content": "4"}], "role must be system, user or assistant"),
        ([{"role": "system", "content": "Be brief."}], "leave --system out"),
    ],
)
def test_histories_that_are_none(run, tmp_path: Path, content: Any, reason: str) -> None:  # type: ignore[no-untyped-def]
    outcome = run("--history", _history(tmp_path, content), "--system", "Obey.")
    assert (outcome.code, outcome.out) == (2, "")
    assert reason in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_history_that_is_missing(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    outcome = run("--history", str(tmp_path / "none.json"))
    assert outcome.code == 2
    assert "cannot be read" in outcome.err


def test_frames_of_a_video(capsys: pytest.CaptureFixture[str], family: Checkpoints, tmp_path: Path) -> None:
    model, names = str(family("qwen2_5_vl")), []
    for number in range(3):
        names.append(str(tmp_path / f"{number}.png"))
        random_image(number, (60, 90)).save(names[-1])
    frames = [option for name in names for option in ("--frames", name)]
    limits = ["--max-pixels", "20000", "--max-new-tokens", "6", "--json"]
    assert run_app(["run", "--model", model, *frames, "--fps", "0.5", "--prompt", PROMPT, *limits]) == 0
    document = json.loads(capsys.readouterr().out)
    shown = [Frames.of([Path(name) for name in names], 0.5)]
    expected = Runtime.load(model, threaded=False).generate(shown, PROMPT, Options(max_pixels=20000, max_new_tokens=6))
    assert document["token_ids"] == list(expected.result().token_ids)
    assert run_app(["run", *frames, "--prompt", PROMPT]) == 2
    assert "takes no videos" in capsys.readouterr().err
