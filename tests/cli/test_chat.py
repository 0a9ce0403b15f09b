"""``avl-edge chat``: several turns, each as the runtime answers the whole conversation."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from avl_edge import Message, Options, Runtime
from avl_edge.cli import run_app
from tests.conftest import Checkpoints
from tests.equipment.served import picture

SHORT = Options(max_new_tokens=8)


def _talk(monkeypatch: pytest.MonkeyPatch, model: Path, *lines: str, options: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return run_app(["chat", "--model", str(model), "--max-new-tokens", "8", *options])


def _expected(model: Path, turns: list[list[bytes | str]], before: list[Message]) -> str:
    """Answers of a runtime that is given everything anew each time, one in a line."""
    said, answers = list(before), ""
    with Runtime.load(model) as runtime:
        for turn in turns:
            said.append(Message("user", turn))
            answer = runtime.submit(runtime.prepare_chat(said, SHORT)).result().text
            said.append(Message("assistant", answer))
            answers += f"{answer}\n"
    return answers


def test_turns_go_on_with_what_was_said_and_shown(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, red, blue = checkpoint("mistral-gqa"), picture((200, 0, 0)), picture((0, 0, 200))
    (tmp_path / "red.png").write_bytes(red)
    (tmp_path / "blue.png").write_bytes(blue)
    lines = ("What is it?", "", "Which colour?", f"/image {tmp_path / 'blue.png'}", "And this?", "Are they the same?")
    options = ("--image", str(tmp_path / "red.png"), "--system", "Be brief.")
    assert _talk(monkeypatch, model, *lines, options=options) == 0
    turns: list[list[bytes | str]] = [
        [red, "What is it?"],
        ["Which colour?"],
        [blue, "And this?"],
        ["Are they the same?"],
    ]
    assert capsys.readouterr().out == _expected(model, turns, [Message("system", "Be brief.")])


def test_what_is_wrong_with_a_line_ends_nothing(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("Hello", "/image nowhere.png", "/wizard", "/forget", "Hello", "/quit", "never asked")
    assert _talk(monkeypatch, checkpoint("mistral-gqa"), *lines) == 0
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert first == second
    assert "nowhere.png" in captured.err
    assert "there is no command /wizard" in captured.err
