"""Data sets as they are found on people's disks, and metrics that say nothing about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from avl_edge.errors import BadInput
from avl_edge.measure.evaluate.layouts import read_folder
from avl_edge.measure.evaluate.metrics import check_questions, scores, unrewarded
from avl_edge.measure.evaluate.questions import Question, Questions, read_lines

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def read(folder: Path, *rows: Any, whole: bool = False) -> Questions:
    """Of a file with a row a line, or ``whole``, one array of them."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    path = folder / "questions.jsonl"
    path.write_text(json.dumps(rows, indent=1) if whole else "\n".join(map(json.dumps, rows)))
    return read_lines(path)


def row(**changes: Any) -> dict[str, Any]:
    return {"image": "a.png", "question": "What?", "answers": ["this"], **changes}


@pytest.mark.parametrize(
    "text", ["<image>\nWhat?", "What?\n<image>", " <image> What? ", "<image>What?", "What?"], ids=repr
)
def test_a_mark_of_the_picture_is_its_place(tmp_path: Path, text: str) -> None:
    (question,) = read(tmp_path, row(question=text)).items
    assert question.text.strip() == "What?"


def test_marks_within_a_question_stay_and_a_mark_alone_is_no_question(tmp_path: Path) -> None:
    found = read(tmp_path, row(question="What does <image> mean?"), row(question="<image>\n"))
    assert [question.text for question in found.items] == ["What does <image> mean?"]
    assert found.problems[0].reason == "the question must be text"


@pytest.mark.parametrize(
    ("changes", "answers"),
    [
        ({"answers": 3}, ("3",)),
        ({"answers": [3, 2.5, "four"]}, ("3", "2.5", "four")),
        ({"answers": None, "answer": "this"}, ("this",)),
        ({"answer": ["that"], "answers": ["this"]}, ("this",)),
    ],
)
def test_answers_as_numbers(tmp_path: Path, changes: dict[str, Any], answers: tuple[str, ...]) -> None:
    assert tuple(answer for each in read(tmp_path, row(**changes)).items for answer in each.answers) == answers


def test_other_names_of_the_same(tmp_path: Path) -> None:
    singular = {"image": "a.png", "question": "What?", "answer": 60}
    bench = {"image": "a.png", "text": "What?", "answer": "60", "category": "conv"}
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "60"}]
    found = read(tmp_path, singular, bench, {"image": "a.png", "conversations": turns})
    assert [(question.text, question.answers) for question in found.items] == [("What?", ("60",))] * 3
    assert read(tmp_path, {"image": "a.png", "conversations": [1, 2]}).problems[0].reason == "the question must be text"


def test_a_whole_array_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, row(), 7, row(question="Why?"), whole=True)
    assert [(question.where, question.text) for question in found.items] == [("entry 1", "What?"), ("entry 3", "Why?")]
    assert [(problem.where, problem.reason) for problem in found.problems] == [("entry 2", "it must be a JSON object")]


def test_pointers_of_git_lfs_are_one_complaint(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(POINTER)
    found = read(tmp_path, row(), *[row(image="b.png") for _ in range(20)])
    assert len(found.items) == 1
    (problem,) = found.problems
    assert problem.where == "line 2 and 19 more"
    assert "git lfs pull" in problem.reason
    (tmp_path / "questions.jsonl").write_bytes(POINTER)
    with pytest.raises(BadInput, match="git lfs pull"):
        read_lines(tmp_path / "questions.jsonl")


# --- Flickr30k ---


def flickr(folder: Path, name: str, text: str) -> Questions:
    for picture in ("1.jpg", "2199200615.jpg"):
        (folder / "flickr30k-images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "flickr30k-images" / picture)
    (folder / name).write_text(text, encoding="utf-8")
    return read_folder(folder)


HEAD = "image_name| comment_number| comment\n"


def test_a_row_with_one_bar_less_and_captions_with_bars(tmp_path: Path) -> None:
    lacking = "2199200615.jpg| 4   A dog runs across the grass .\n"
    rows = f"1.jpg| 0| A dog | or a cat runs\u2028 away .\n{lacking}1.jpg| 1|Two dogs\r\n"
    found = flickr(tmp_path, "results.csv", HEAD + rows)
    assert {question.image.name: question.answers for question in found.items} == {
        "1.jpg": ("A dog | or a cat runs\u2028 away .", "Two dogs"),
        "2199200615.jpg": ("A dog runs across the grass .",),
    }
    assert found.problems == ()


def test_a_caption_with_a_tab_keeps_its_head(tmp_path: Path) -> None:
    found = flickr(tmp_path, "results_20130124.token", "1.jpg#0\tA dog\tand a cat\n1.jpg\n")
    assert found.items[0].answers == ("A dog\tand a cat",)
    assert found.problems[0].where == "line 2 of results_20130124.token"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.csv", "image,caption\n1.jpg,A dog runs\n"),
        ("results_20130124.token", "1.jpg| 0| A dog runs\n"),
        ("results.csv", ""),
    ],
)
def test_a_table_of_another_form_says_so(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(BadInput, match="no line of the form that is known"):
        flickr(tmp_path, name, text)


# --- metrics ---


def question(*answers: str) -> Question:
    return Question("line 1", Path("a.png"), "?", answers)


@pytest.mark.parametrize("metric", ["vqa_accuracy", "textvqa_accuracy"])
def test_accuracy_of_people_needs_people(metric: str) -> None:
    for few in (1, 2, 3):
        with pytest.raises(BadInput, match=rf"line 1 has {few}.*choose --metric exact_match, anls or containment"):
            check_questions(metric, [question(*["red"] * 10), question(*["red"] * few)])
        assert scores(metric, [question(*["red"] * few)], ["red"])[0] < 1
    check_questions(metric, [question(*["red"] * 4)])
    assert scores(metric, [question(*["red"] * 4)], ["red"]) == [1]


def test_cider_needs_two_pictures() -> None:
    with pytest.raises(BadInput, match="cannot be computed on one picture"):
        check_questions("cider", [question("a cat")])
    check_questions("cider", [question("a cat"), question("a dog")])
    check_questions("anls", [question("a cat")])


def test_references_that_the_official_evaluator_never_rewards_are_named() -> None:
    """VQAEval of the public evaluator gives 0 to "t-shirt" where ten people said "t-shirt"."""
    lost = [question(*["t-shirt"] * 10), question(*["the sun"] * 10)]
    sound = [question(*["red"] * 10), question(*["t-shirt"] * 9, "shirt"), question(*["shirt"] * 9, "t-shirt")]
    assert scores("vqa_accuracy", lost, ["t-shirt", "the sun"]) == [0, 0]
    assert [answer for _, answer in unrewarded("vqa_accuracy", [*lost, *sound])] == ["t-shirt", "the sun"]
    assert unrewarded("textvqa_accuracy", lost) == []
    assert scores("textvqa_accuracy", lost, ["t-shirt", "the sun"]) == [1, 1]
