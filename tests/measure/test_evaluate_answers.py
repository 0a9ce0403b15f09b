"""The file of answers: read back as they were, whatever was cut off, and never over somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from avl_edge import BadInput
from avl_edge.measure.evaluate import Answer, AnswerLog, Setting


class TestAnswerLog:
    ANSWER = Answer(0, "avl", 0.1, {"core": 5}, "ein Größe\n", (4, 5), 10, 20, 40, 0.5, 0.4, 1.25, 1 / 3, None)

    def test_answers_come_back_as_they_were(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        AnswerLog(path, {"a": 1}).add(self.ANSWER)
        assert AnswerLog(path, {"a": 1})[Setting("avl", 0.1), 0] == self.ANSWER
        assert (Setting("avl", 0.1), 1) not in AnswerLog(path, {"a": 1})

    def test_a_broken_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        AnswerLog(path, {"a": 1}).add(self.ANSWER)
        path.write_bytes(path.read_bytes() + b'{"question": 1}\n')
        with pytest.raises(BadInput, match=r"line 3 of .* is not an answer"):
            AnswerLog(path, {"a": 1})

    @pytest.mark.parametrize("content", [b"somebody's notes", b"notes\nmore", b"\xff\xfe\n", b"\n"])
    def test_another_file_is_left_alone(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(content)
        with pytest.raises(BadInput, match="holds the answers of another evaluation"):
            AnswerLog(path, {"a": 1})
        assert path.read_bytes() == content

    @pytest.mark.parametrize("cut", range(1, 10))
    def test_a_first_line_that_was_cut_off_is_written_anew(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "a.jsonl"
        AnswerLog(path, {"a": 1})
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        AnswerLog(path, {"a": 1})
        assert path.read_bytes() == whole
