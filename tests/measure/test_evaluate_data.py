"""Questions from data as it is found: good, broken, and in each data set's own folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from avl_edge.errors import BadInput
from avl_edge.measure.evaluate.data import read_questions
from avl_edge.measure.evaluate.demo import draw_questions
from avl_edge.measure.evaluate.layouts import read_folder
from avl_edge.measure.evaluate.questions import Question, Questions, read_lines
from tools.demo_model.evaluate import held_out
from tools.demo_model.scenes import render


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _row(**changes: Any) -> bytes:
    return json.dumps({"image": "a.png", "question": "What?", "answers": ["this"], **changes}).encode()


@pytest.fixture
def lines(tmp_path: Path) -> Callable[[list[bytes]], Questions]:
    _picture(tmp_path / "a.png")

    def read(rows: list[bytes]) -> Questions:
        (tmp_path / "questions.jsonl").write_bytes(b"\n".join(rows))
        return read_lines(tmp_path / "questions.jsonl")

    return read


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", " ", "a.png", "yes"])
json_values = scalars | st.dictionaries(
    st.sampled_from(["image", "question", "answers", "kind"]), scalars | st.lists(scalars, max_size=2)
)


class TestLines:
    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b'{"image": "a.png", "question":', "it is not valid JSON"),
            (b'{"question": "caf\xe9"}', "it is not UTF-8 text"),
            (b"[" * 100_000, "it is not valid JSON"),
            (b"[1, 2]", "it must be a JSON object"),
            (_row(image=""), "it needs an image, the path of a picture"),
            (_row(image=7), "it needs an image, the path of a picture"),
            (_row(question="  "), "the question must be text"),
            (_row(question=None), "the question must be text"),
            (_row(answers=[]), "there is no answer to compare with"),
            (_row(answers=["", " "]), "there is no answer to compare with"),
            (_row(answers=None), "the answers must be a list of texts"),
            (_row(answers=["yes", True]), "the answers must be a list of texts"),
            (_row(answers=["yes", {}]), "the answers must be a list of texts"),
            (b"9" * 5000, "it is not valid JSON"),
        ],
    )
    def test_a_line_that_cannot_be_used_is_named_and_the_rest_goes_on(self, lines, line: bytes, reason: str) -> None:
        found = lines([_row(), b"", line, _row(question="Why?")])
        assert [(q.where, q.text) for q in found.items] == [("line 1", "What?"), ("line 4", "Why?")]
        assert [(p.where, p.reason) for p in found.problems] == [("line 3", reason)]

    @pytest.mark.parametrize("name", ["lost.png", ".", "a" * 5000, "a\0.png", "\ud800.png", "http://a/b.png"])
    def test_a_missing_picture_is_named(self, lines, name: str) -> None:
        (problem,) = lines([_row(image=name)]).problems
        assert problem.where == "line 1"
        assert problem.reason.startswith("there is no picture ")

    @given(st.lists(st.one_of(st.binary(), json_values.map(lambda value: json.dumps(value).encode())), max_size=5))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    def test_whatever_the_lines_hold_each_is_a_question_or_a_problem(self, lines, rows: list[bytes]) -> None:
        found = lines(rows)
        expected = [line for line in b"\n".join(rows).removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        assert len(found.items) + len(found.problems) == len(expected)

    def test_one_answer_may_stand_alone_and_empty_ones_do_not_count(self, lines) -> None:
        found = lines([_row(answers="yes"), _row(answers=["", "no"])])
        assert [q.answers for q in found.items] == [("yes",), ("no",)]

    def test_windows_files_are_read_too(self, lines) -> None:
        assert len(lines([b"\xef\xbb\xbf" + _row() + b"\r", _row() + b"\r", b"\r"]).items) == 2

    def test_a_sample_is_chosen_by_the_seed_and_keeps_the_order(self, lines) -> None:
        found = lines([_row(question=str(i)) for i in range(50)])
        some = found.sample(10, seed=1)
        assert some == found.sample(10, seed=1) != found.sample(10, seed=2)
        numbers = [int(q.text) for q in some.items]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 10
        assert found.sample(51, seed=1) == found

    def test_the_digest_tells_questions_apart_but_not_folders(self, lines) -> None:
        first = lines([_row()]).digest()
        assert first == lines([_row()]).digest()
        assert len({first, lines([_row(answers=["that"])]).digest(), lines([_row(), _row()]).digest()}) == 3


def _docvqa(folder: Path) -> None:
    row = {"questionId": 7, "question": "What year?", "image": "documents/x_1.png", "answers": ["1999", "year 1999"]}
    _json(folder / "val_v1.0_withQT.json", {"data": [{**row, "question_types": ["form"]}]})
    _picture(folder / "spdocvqa_images" / "x_1.png")


def _textvqa(folder: Path) -> None:
    row = {"question_id": 7, "question": "What brand?", "image_id": "0a1b", "answers": ["nokia"] * 9 + ["toshiba"]}
    _json(folder / "TextVQA_0.5.1_val.json", {"data": [row]})
    _picture(folder / "train_images" / "0a1b.jpg")


def _ocrbench(folder: Path) -> None:
    row = {"dataset_name": "HME100k", "id": 7, "type": "Handwritten", "question": "Read it.", "answers": "x ^ 2"}
    _json(folder / "OCRBench" / "OCRBench.json", [{**row, "image_path": "HME100k/1.jpg"}])
    _picture(folder / "OCRBench_Images" / "HME100k" / "1.jpg")


def _vqav2(folder: Path) -> None:
    asked = {"question_id": 7, "image_id": 42, "question": "How many?"}
    _json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [asked]})
    people = [{"answer": "2", "answer_id": i} for i in range(10)]
    given = {"question_id": 7, "image_id": 42, "answer_type": "number", "answers": people}
    _json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": [given]})
    _picture(folder / "val2014" / "COCO_val2014_000000000042.jpg")


def _nocaps(folder: Path) -> None:
    captions = [{"image_id": 7, "id": i, "caption": text} for i, text in enumerate(["A cat.", "A small cat."])]
    image = {"id": 7, "file_name": "ab12.jpg", "open_images_id": "ab12"}
    _json(folder / "nocaps_val_4500_captions.json", {"images": [image], "annotations": captions})
    _picture(folder / "val" / "ab12.jpg")


def _flickr_splits(folder: Path) -> None:
    sentences = [{"raw": "A cat."}, {"raw": "A small cat."}]
    rows = [{"filename": f"{split}.jpg", "split": split, "sentences": sentences} for split in ("train", "test")]
    _json(folder / "dataset_flickr30k.json", {"images": rows})
    _picture(folder / "flickr30k-images" / "test.jpg")


def _flickr_tokens(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    text = "test.jpg#0\tA cat.\ntest.jpg#1\tA small cat.\n\n"
    (folder / "results_20130124.token").write_text(text)
    _picture(folder / "flickr30k-images" / "test.jpg")


def _flickr_csv(folder: Path) -> None:
    text = "image_name| comment_number| comment\ntest.jpg| 0| A cat.\ntest.jpg| 1| A small cat.\n"
    inner = folder / "flickr30k_images"
    _picture(inner / "flickr30k_images" / "test.jpg")
    (inner / "results.csv").write_text(text)


CAPTION = "Provide a one-sentence caption for the provided image."
SHORT = "\nAnswer the question using a single word or phrase."
LAYOUTS = [
    (_docvqa, "DocVQA", "anls", f"What year?{SHORT}", ("1999", "year 1999"), "form"),
    (_textvqa, "TextVQA", "textvqa_accuracy", f"What brand?{SHORT}", ("nokia",) * 9 + ("toshiba",), ""),
    (_ocrbench, "OCRBench", "containment", "Read it.", ("x ^ 2",), "Handwritten"),
    (_vqav2, "VQAv2", "vqa_accuracy", f"How many?{SHORT}", ("2",) * 10, "number"),
    (_nocaps, "Nocaps", "cider", CAPTION, ("A cat.", "A small cat."), ""),
    (_flickr_splits, "Flickr30k", "cider", CAPTION, ("A cat.", "A small cat."), ""),
    (_flickr_tokens, "Flickr30k", "cider", CAPTION, ("A cat.", "A small cat."), ""),
    (_flickr_csv, "Flickr30k", "cider", CAPTION, ("A cat.", "A small cat."), ""),
]
BUILDERS = [layout[0] for layout in LAYOUTS]


class TestLayouts:
    @pytest.mark.parametrize(("build", "name", "metric", "prompt", "answers", "kind"), LAYOUTS)
    def test_the_folder_is_read(self, tmp_path: Path, build, name, metric, prompt, answers, kind) -> None:
        build(tmp_path)
        found = read_folder(tmp_path)
        assert (found.name, found.metric, found.problems) == (name, metric, ())
        (question,) = found.items
        assert (found.prompt(question), question.answers, question.kind) == (prompt, answers, kind)
        assert question.image.is_file()
        assert question.formula == (name == "OCRBench")

    @pytest.mark.parametrize("build", BUILDERS)
    def test_a_missing_picture_is_named(self, tmp_path: Path, build) -> None:
        build(tmp_path)
        for picture in [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")]:
            picture.unlink()
        found = read_folder(tmp_path)
        assert found.items == ()
        assert "there is no picture" in found.problems[0].reason

    @pytest.mark.parametrize("build", BUILDERS[:6])
    @pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"7", b'{"data": 3, "images": {}}', b"[" * 100_000])
    def test_a_broken_annotation_file_is_one_line(self, tmp_path: Path, build, content: bytes) -> None:
        build(tmp_path)
        for path in tmp_path.rglob("*.json"):
            path.write_bytes(content)
        with pytest.raises(BadInput, match="get it again"):
            read_folder(tmp_path)

    @pytest.mark.parametrize("build", BUILDERS[:6])
    def test_rows_of_the_wrong_kind_are_left_out(self, tmp_path: Path, build) -> None:
        """Every value of every row replaced by something it never is."""
        build(tmp_path)
        for path in tmp_path.rglob("*.json"):
            content = json.loads(path.read_text())
            for rows in [content] if isinstance(content, list) else list(content.values()):
                rows.append("no row")
                rows.append({name: [{}] for name in rows[0]})
            _json(path, content)
        assert len(read_folder(tmp_path).items) == 1

    def test_vqav2_needs_both_files(self, tmp_path: Path) -> None:
        _vqav2(tmp_path)
        (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
        with pytest.raises(BadInput, match="lacks v2_OpenEnded"):
            read_folder(tmp_path)

    def test_another_folder_is_refused_with_the_names_that_are_known(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"val_v1\.0_withQT\.json.*give a JSONL file"):
            read_folder(tmp_path)


class TestSources:
    def test_the_demo_is_the_generators_own(self, tmp_path: Path) -> None:
        found = read_questions("demo", 5, 6, tmp_path)
        assert (found.name, found.metric, found.problems) == ("demo", "exact_match", ())
        for own, (number, expected) in zip(found.items, held_out(5, 6), strict=True):
            assert (own.text, own.answers, own.kind) == (expected.text, (expected.answer,), expected.kind)
            assert Image.open(own.image).tobytes() == render(number).image.tobytes()

    def test_without_the_generator_the_demo_is_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="install from a checkout"):
            draw_questions(tmp_path, 1, 1, root=tmp_path)

    def test_a_generator_that_fails_is_one_line(self, tmp_path: Path) -> None:
        package = tmp_path / "tools" / "demo_model"
        package.mkdir(parents=True)
        for folder in (package, package.parent):
            (folder / "__init__.py").touch()
        (package / "evaluate.py").write_text("raise ModuleNotFoundError('No module named x')")
        with pytest.raises(BadInput, match=r"cannot be drawn \(ModuleNotFoundError: No module named x\)"):
            draw_questions(tmp_path, 1, 1, root=tmp_path)

    def test_data_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="there is no data"):
            read_questions(str(tmp_path / "no.jsonl"), 1, None, tmp_path)

    @pytest.mark.parametrize(("content", "reason"), [("", "there are none"), ("nonsense", "line 1: it is not valid")])
    def test_data_without_a_question_is_one_line(self, tmp_path: Path, content: str, reason: str) -> None:
        path = tmp_path / "questions.jsonl"
        path.write_text(content)
        with pytest.raises(BadInput, match=reason):
            read_questions(str(path), 1, None, tmp_path)


def test_a_question_is_asked_with_its_data_sets_instruction() -> None:
    question = Question("", Path(), "How many?", ("2",))
    plain = Questions("x", (question,), ())
    assert plain.prompt(question) == "How many?"
    assert replace(plain, instruction="Use one word.").prompt(question) == "How many?\nUse one word."
