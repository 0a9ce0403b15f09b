"""Data sets in the folders that they are distributed in, recognised by the names of their annotation files.

Each layout follows the data set's own description of its files:

- DocVQA (rrc.cvc.uab.es, challenge 17): ``val_v1.0_withQT.json`` or ``val_v1.0.json``, pictures in
  ``spdocvqa_images`` or ``documents``;
- TextVQA (textvqa.org): ``TextVQA_0.5.1_val.json``, pictures in ``train_images``;
- OCRBench (github.com/Yuliang-Liu/MultimodalOCR): ``OCRBench.json``, pictures in ``OCRBench_Images``;
- VQAv2 (visualqa.org): ``v2_OpenEnded_mscoco_val2014_questions.json``, ``v2_mscoco_val2014_annotations.json``,
  pictures in ``val2014``;
- Nocaps (nocaps.org): ``nocaps_val_4500_captions.json``, which is in COCO's format, pictures in ``images`` or ``val``;
- Flickr30k: ``dataset_flickr30k.json`` (the common splits, of which the test split is taken), else
  ``results_20130124.token`` (all pictures) or ``results.csv``, pictures in ``flickr30k-images`` or
  ``flickr30k_images``.

Only the splits whose answers are public are read. The instructions are those that LLaVA-1.5 was evaluated with.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import BadInput
from .questions import Collector, Problem, Questions

_SHORT = "Answer the question using a single word or phrase."
_CAPTION = "Provide a one-sentence caption for the provided image."
_DEPTH = 3
_CSV_LINE = re.compile(r"([^|]+)\|\s*[0-9]+(?:\s*\||\s)(.*)")
_TOKEN_LINE = re.compile(r"([^\t#]+)#[0-9]+\t(.*)")

Rows = Iterable[dict[str, Any]]


def read_folder(folder: Path) -> Questions:
    """The questions of a data set's folder. Raises :class:`BadInput` when it is none of those known here."""
    for names, reader in _LAYOUTS:
        for name in names:
            annotations = _find(folder, name)
            if annotations is not None:
                return reader(folder, annotations)
    known = ", ".join(name for names, _ in _LAYOUTS for name in names)
    raise BadInput(
        f"{folder} holds none of the annotation files that are known ({known}): "
        f"give a JSONL file of image, question and answers"
    )


def _find(folder: Path, name: str) -> Path | None:
    """The file or folder called ``name`` in ``folder`` or below it, the highest one first."""
    for depth in range(_DEPTH):
        found = sorted(folder.glob("*/" * depth + name))
        if found:
            return found[0]
    return None


def _pictures(folder: Path, *names: str) -> Path:
    """The first of the folders ``names`` that is there; else ``folder``, where each picture is then missed by name."""
    found = (_find(folder, name) for name in names)
    return next((path for path in found if path is not None and path.is_dir()), folder)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text: get it again") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON ({error}): get it again") from None


def _rows(path: Path, key: str | None) -> Rows:
    """The objects in the list of an annotation file: the list itself, or the one under ``key``."""
    content = _load(path)
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list):
        raise BadInput(f"{path} must hold a list{f' under {key!r}' if key else ''}: get it again")
    return [row for row in content if isinstance(row, dict)]


def _done(name: str, found: Collector, metric: str, instruction: str) -> Questions:
    return Questions(name, tuple(found.items), found.all_problems, metric, instruction)


def _docvqa(folder: Path, path: Path) -> Questions:
    pictures, found = _pictures(folder, "spdocvqa_images", "documents"), Collector()
    for row in _rows(path, "data"):
        types = row.get("question_types")
        kind = types[0] if isinstance(types, list) and types else ""
        image = pictures / Path(str(row.get("image"))).name
        found.add(f"question {row.get('questionId')}", image, row.get("question"), row.get("answers"), kind)
    return _done("DocVQA", found, "anls", _SHORT)


def _textvqa(folder: Path, path: Path) -> Questions:
    pictures, found = _pictures(folder, "train_images"), Collector()
    for row in _rows(path, "data"):
        image = pictures / f"{row.get('image_id')}.jpg"
        found.add(f"question {row.get('question_id')}", image, row.get("question"), row.get("answers"))
    return _done("TextVQA", found, "textvqa_accuracy", _SHORT)


def _ocrbench(folder: Path, path: Path) -> Questions:
    pictures, found = _pictures(folder, "OCRBench_Images"), Collector()
    for row in _rows(path, None):
        image = pictures / str(row.get("image_path"))
        formula = row.get("dataset_name") == "HME100k"
        where = f"question {row.get('id')}"
        found.add(where, image, row.get("question"), row.get("answers"), row.get("type"), formula)
    return _done("OCRBench", found, "containment", "")


def _vqav2(folder: Path, path: Path) -> Questions:
    texts = _find(folder, "v2_OpenEnded_mscoco_val2014_questions.json")
    if texts is None:
        raise BadInput(f"{folder} lacks v2_OpenEnded_mscoco_val2014_questions.json, the questions to {path.name}")
    asked = {str(row.get("question_id")): row.get("question") for row in _rows(texts, "questions")}
    pictures, found = _pictures(folder, "val2014"), Collector()
    for row in _rows(path, "annotations"):
        image = pictures / f"COCO_val2014_{row.get('image_id')!s:0>12}.jpg"
        given = row.get("answers")
        answers = [a.get("answer") for a in given if isinstance(a, dict)] if isinstance(given, list) else None
        number = str(row.get("question_id"))
        found.add(f"question {number}", image, asked.get(number), answers, row.get("answer_type"))
    return _done("VQAv2", found, "vqa_accuracy", _SHORT)


def _captions(name: str, captions: Iterable[tuple[str, Path, list[Any]]]) -> Questions:
    found = Collector()
    for where, image, answers in captions:
        found.add(where, image, _CAPTION, answers)
    return _done(name, found, "cider", "")


def _nocaps(folder: Path, path: Path) -> Questions:
    pictures, captions = _pictures(folder, "images", "val"), defaultdict[str, list[Any]](list)
    for row in _rows(path, "annotations"):
        captions[str(row.get("image_id"))].append(row.get("caption"))
    images = _rows(path, "images")
    return _captions(
        "Nocaps",
        ((f"image {r.get('id')}", pictures / str(r.get("file_name")), captions[str(r.get("id"))]) for r in images),
    )


def _flickr_pictures(folder: Path) -> Path:
    """The files are also handed out with a folder of the same name inside."""
    pictures = _pictures(folder, "flickr30k-images", "flickr30k_images")
    inner = pictures / pictures.name
    return inner if inner.is_dir() else pictures


def _flickr_splits(folder: Path, path: Path) -> Questions:
    pictures = _flickr_pictures(folder)

    def captions() -> Iterator[tuple[str, Path, list[Any]]]:
        for row in _rows(path, "images"):
            if row.get("split") == "test":
                sentences = row.get("sentences")
                texts = [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else []
                yield f"image {row.get('filename')}", pictures / str(row.get("filename")), texts

    return _captions("Flickr30k", captions())


def _flickr_table(folder: Path, path: Path) -> Questions:
    """``name.jpg#0<tab>caption`` a line, or ``name.jpg| 0| caption`` below a heading.

    The public table lacks the second bar in one line. A caption may hold bars and tabs.
    """
    is_table = path.suffix == ".csv"
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode(errors="replace").split("\n")
    captions, problems = defaultdict[str, list[Any]](list), []
    for number, line in enumerate(lines[is_table:], 1 + is_table):
        match = (_CSV_LINE if is_table else _TOKEN_LINE).fullmatch(line.strip())
        if match:
            captions[match[1].strip()].append(match[2].strip())
        elif line.strip():
            problems.append(Problem(f"line {number} of {path.name}", "it is not a picture's name and a caption"))
    if not captions:
        form = "name.jpg| 0| caption" if is_table else "name.jpg#0, a tab and a caption"
        raise BadInput(f"{path} has no line of the form that is known, {form}: give the file as it was published")
    pictures = _flickr_pictures(folder)
    found = _captions("Flickr30k", ((f"image {name}", pictures / name, texts) for name, texts in captions.items()))
    return replace(found, problems=(*problems, *found.problems))


_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Path, Path], Questions]], ...] = (
    (("val_v1.0_withQT.json", "val_v1.0.json"), _docvqa),
    (("TextVQA_0.5.1_val.json",), _textvqa),
    (("OCRBench.json",), _ocrbench),
    (("v2_mscoco_val2014_annotations.json",), _vqav2),
    (("nocaps_val_4500_captions.json",), _nocaps),
    (("dataset_flickr30k.json",), _flickr_splits),
    (("results_20130124.token", "results.csv"), _flickr_table),
)
