"""How good answers are. Edit distances are rapidfuzz's, CIDEr is its authors' code; both come with the ``eval`` extra.

A metric gives one score per question, and a set of questions has their mean. The character error rate alone is a
quotient of sums.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence

from ...errors import BadInput
from ...optional import optional
from .questions import Question
from .vqa import textvqa_accuracy, vqa_accuracy

# DocVQA's evaluation counts an answer below this similarity as a wrong one, not as a misread one.
_ANLS_THRESHOLD = 0.5

FEWEST_PEOPLE = 4
"""Three others have to agree with a person's answer before it counts as wholly right."""
CAPTION_METRIC = "cider"
METRICS = ("exact_match", "anls", "containment", "vqa_accuracy", "textvqa_accuracy", CAPTION_METRIC)


def require_packages(metric: str) -> None:
    """Raise :class:`BadInput` where what the metrics need is missing, before any work is done."""
    optional("rapidfuzz", "the evaluation")
    if metric == CAPTION_METRIC:
        optional("pycocoevalcap", "CIDEr")
        if shutil.which("java") is None:
            raise BadInput("the tokenizer of CIDEr needs Java: apt install default-jre-headless")


def check_questions(metric: str, questions: Sequence[Question]) -> None:
    """Raise :class:`BadInput` where ``metric`` says nothing about such questions, before any is asked."""
    if metric == CAPTION_METRIC and len(questions) < 2:
        raise BadInput("CIDEr cannot be computed on one picture: it weighs words by how many pictures have them")
    few = [question for question in questions if len(question.answers) < FEWEST_PEOPLE]
    if metric.endswith("vqa_accuracy") and few:
        first, answers = few[0], len(few[0].answers)
        raise BadInput(
            f"{metric} compares with the answers of {FEWEST_PEOPLE} people and more, and {first.where} has {answers}: "
            "even a right answer would not count as one; choose --metric exact_match, anls or containment"
        )


def unrewarded(metric: str, questions: Sequence[Question]) -> list[tuple[Question, str]]:
    """Questions with the answer most people gave, where the metric's official evaluator gives nothing for that answer:
    what people said and what a model says are not normalised alike."""
    if metric != "vqa_accuracy":
        return []
    common = ((question, Counter(question.answers).most_common(1)[0][0]) for question in questions)
    return [(question, answer) for question, answer in common if vqa_accuracy(answer, question.answers) == 0]


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is one of the answers, but for space around them; else 0."""
    return float(prediction.strip() in {answer.strip() for answer in answers})


def character_errors(prediction: str, answers: Sequence[str]) -> tuple[int, int]:
    """Characters to change, insert or delete to get the nearest answer, and that answer's length.

    The character error rate of many questions is the sum of the first over the sum of the second.
    """
    levenshtein = optional("rapidfuzz.distance.Levenshtein", "the character error rate")
    stripped = [answer.strip() for answer in answers]
    return min((levenshtein.distance(prediction.strip(), answer), len(answer)) for answer in stripped)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0 below one half (arXiv 1905.13648, DocVQA's metric).

    At exactly one half the paper gives 0 and the public evaluation one half; this follows the evaluation.
    """
    levenshtein = optional("rapidfuzz.distance.Levenshtein", "ANLS")
    said = _folded(prediction)
    similarity = 1 - min(levenshtein.normalized_distance(said, _folded(answer)) for answer in answers)
    return similarity if similarity >= _ANLS_THRESHOLD else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def containment(prediction: str, answers: Sequence[str], formula: bool = False) -> float:
    """OCRBench's score (arXiv 2305.07895): 1 when an answer stands in the prediction, without regard to case.

    ``formula``: with regard to case and without spaces, as it treats handwritten formulas.
    """

    def even(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    return float(any(even(answer) in even(prediction) for answer in answers))


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr (arXiv 1411.5726) of each caption, as COCO's evaluation computes it, tokenizer included; 0 to 10.

    A caption's score depends on all references: words that most pictures are described with count little.
    """
    module = optional("pycocoevalcap.cider.cider", "CIDEr")
    gold, said = _tokenized(references), _tokenized([[text] for text in predictions])
    _, scores = module.Cider().compute_score(gold, said)
    return [float(score) for score in scores]


def _tokenized(captions: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    module = optional("pycocoevalcap.tokenizer.ptbtokenizer", "CIDEr")
    # One line a caption: the tokenizer tells captions apart by line breaks.
    rows = {i: [{"caption": " ".join(text.split())} for text in texts] for i, texts in enumerate(captions)}
    try:
        tokens: dict[int, list[str]] = module.PTBTokenizer().tokenize(rows)
    except OSError as error:
        raise BadInput(
            f"CIDEr's tokenizer cannot run ({error.strerror}): it needs Java and a writable folder"
        ) from None
    return {i: tokens.get(i) or [""] for i in rows}


def scores(metric: str, questions: Sequence[Question], predictions: Sequence[str]) -> list[float]:
    """The score of each prediction by ``metric``, one of :data:`METRICS`."""
    pairs = list(zip(predictions, questions, strict=True))
    if metric == CAPTION_METRIC:
        return cider(predictions, [question.answers for question in questions])
    if metric == "containment":
        return [containment(text, question.answers, question.formula) for text, question in pairs]
    one = {
        "exact_match": exact_match,
        "anls": anls,
        "vqa_accuracy": vqa_accuracy,
        "textvqa_accuracy": textvqa_accuracy,
    }[metric]
    return [one(text, question.answers) for text, question in pairs]


def character_error_rate(questions: Sequence[Question], predictions: Sequence[str]) -> float:
    """Edited characters over the answers' characters, of all questions together; it may exceed 1."""
    pairs = [character_errors(text, q.answers) for text, q in zip(predictions, questions, strict=True)]
    return sum(errors for errors, _ in pairs) / sum(length for _, length in pairs)
