"""Each metric equals its public reference implementation: installed where there is one, else by recorded scores."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import jiwer
import pytest
from anls_star import anls_score
from hypothesis import given, settings
from hypothesis import strategies as st

from avl_edge.errors import BadInput
from avl_edge.measure.evaluate import metrics
from avl_edge.measure.evaluate.questions import Question
from avl_edge.measure.evaluate.vqa import textvqa_accuracy, vqa_accuracy

RECORDED = json.loads((Path(__file__).parent / "evaluate_references.json").read_text(encoding="utf-8"))

words = st.sampled_from(["red", "Red", "blue", "navy-blue", "12", "12.5", "1,000", "STOP", "", "é", "ß", "İ", "cat's"])
texts = st.one_of(st.lists(words, max_size=5).map(" ".join), st.text(max_size=12))
answers = texts.filter(lambda text: text.strip())


@given(texts, st.lists(answers, min_size=1, max_size=4))
@settings(deadline=None)
def test_anls_equals_the_anls_star_package(prediction: str, given_answers: list[str]) -> None:
    expected = anls_score(tuple(given_answers), prediction)
    assert metrics.anls(prediction, given_answers) == pytest.approx(expected, abs=1e-12)


def test_anls_keeps_one_half_and_drops_less() -> None:
    assert metrics.anls("abxx", ["abcd"]) == 0.5
    assert metrics.anls("axxx", ["abcd"]) == 0.0


@given(st.lists(st.tuples(texts, answers), min_size=1, max_size=5))
@settings(deadline=None)
def test_the_character_error_rate_equals_jiwer(pairs: list[tuple[str, str]]) -> None:
    # jiwer strips spaces and no other white space, and joins a text's lines in no defined way.
    pairs = [(" ".join(said.split()), " ".join(answer.split())) for said, answer in pairs]
    questions = [Question("", Path(), "?", (answer,)) for _, answer in pairs]
    own = metrics.character_error_rate(questions, [said for said, _ in pairs])
    assert own == pytest.approx(jiwer.cer([answer for _, answer in pairs], [said for said, _ in pairs]))


def test_the_nearest_answer_counts() -> None:
    assert metrics.character_errors(" 12 km ", ["120 km", "twelve", "12 m"]) == (1, 4)


@pytest.mark.parametrize("case", RECORDED["vqa"])
def test_vqa_accuracy_equals_the_public_evaluators(case: dict) -> None:
    assert vqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["vqav2"], abs=1e-8)
    assert textvqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["textvqa"], abs=1e-8)


@pytest.mark.parametrize("case", RECORDED["ocrbench"])
def test_containment_equals_ocrbench(case: dict) -> None:
    assert metrics.containment(case["prediction"], case["answers"], case["formula"]) == case["score"]


def test_exact_match_is_exact_but_for_space_around() -> None:
    assert metrics.exact_match(" 60\n", ["50", "60 "]) == 1
    assert metrics.exact_match("Red", ["red"]) == 0


CAPTIONS = {
    "a dog runs on the grass": ["a brown dog runs over the grass", "the dog is running on grass", "a dog on a lawn"],
    "two men near a red car": ["two men stand beside a red car", "a red car and two men"],
    "a plate of food": ["a plate with rice and meat", "food on a white plate", "a plate of food on a table"],
    "nothing alike": ["boats lie in a small harbour"],
}


def _cider(predictions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D from its paper (arXiv 1411.5726, section 4.2), on captions that are tokens already."""

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        tokens = text.split()
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    def similarity(said: str, gold: str, n: int) -> float:
        def weights(text: str) -> dict[tuple[str, ...], float]:
            pictures = len(references)
            seen = {
                gram: sum(any(gram in grams(r, n) for r in group) for group in references) for gram in grams(text, n)
            }
            return {gram: count * math.log(pictures / max(seen[gram], 1)) for gram, count in grams(text, n).items()}

        own, other = weights(said), weights(gold)
        lengths = math.hypot(*own.values()) * math.hypot(*other.values())
        product = sum(min(weight, other.get(gram, 0)) * other.get(gram, 0) for gram, weight in own.items())
        return product / lengths if lengths else 0.0

    def one(said: str, group: list[str]) -> float:
        total = 0.0
        for gold in group:
            # The public code counts bigrams for a caption's length, one less than its words.
            shorter = len(said.split()) - len(gold.split())
            total += math.exp(-(shorter**2) / 72) * sum(similarity(said, gold, n) for n in range(1, 5)) / 4
        return 10 * total / len(group)

    return [one(said, group) for said, group in zip(predictions, references, strict=True)]


@pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer needs Java")
def test_cider_equals_its_formula() -> None:
    said, gold = list(CAPTIONS), list(CAPTIONS.values())
    own = metrics.cider([f"{text.capitalize()}." for text in said], gold)
    assert own == pytest.approx(_cider(said, gold), rel=1e-6)
    assert own[2] > own[3] == 0


@pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer needs Java")
def test_captions_of_several_lines_or_none_stay_apart() -> None:
    scores = metrics.cider(["a dog\nruns on the grass", "", "a plate of food", "boats"], list(CAPTIONS.values()))
    assert [score > 0 for score in scores] == [True, False, True, True]


@pytest.mark.parametrize(("metric", "package"), [("anls", "rapidfuzz"), ("cider", "pycocoevalcap")])
def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, metric: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=rf"needs {package}: pip install 'avl-edge\[eval\]'$"):
        metrics.require_packages(metric)


def test_missing_java_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(BadInput, match="needs Java: apt install"):
        metrics.require_packages("cider")
