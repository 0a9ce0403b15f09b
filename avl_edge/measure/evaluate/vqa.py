"""VQA accuracy (arXiv 1505.00468) with the normalisation of its public evaluators.

An answer of ten people's: it is right to the degree that three others gave it. Two evaluators are in use, and they
treat the people's answers differently: the one of VQAv2 (github.com/GT-Vision-Lab/VQA) only evens out their
punctuation, since they are stored normalised; the one of TextVQA (mmf, also EvalAI's) normalises both sides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_LONE_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA = re.compile(r"\d,\d")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(digit) for digit, word in enumerate(_NUMBERS)}}

# The evaluators restore one apostrophe that is missing from any of these.
# fmt: off
_CONTRACTIONS = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "isn't", "it'd", "it'd've",
    "it'll", "ma'am", "might've", "mightn't", "mightn't've", "must've", "mustn't", "needn't", "not've", "o'clock",
    "oughtn't", "'ow's'at", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've", "somebody'd've",
    "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's", "something'd",
    "something'd've", "something'll", "that's", "there'd", "there'd've", "there're", "there's", "they'd", "they'd've",
    "they'll", "they're", "they've", "'twas", "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's",
    "what've", "when's", "where'd", "where's", "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll",
    "why're", "why's", "won't", "would've", "wouldn't", "wouldn't've", "y'all", "y'all'll", "y'all'd've", "you'd",
    "you'd've", "you'll", "you're", "you've",
)
# fmt: on


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


_RESTORED = {short: word for word in _CONTRACTIONS for short in _without_one_apostrophe(word)}
# Both evaluators take this one the other way round; figures are only comparable with it.
_RESTORED["somebody'd"] = "somebodyd"


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy of one answer, 0 to 1: the mean, over leaving one person out, of min(1, others agreeing / 3)."""
    people = [_one_line(answer) for answer in answers]
    if len(set(people)) > 1:
        people = [_even_punctuation(answer) for answer in people]
    return _agreement(_normalise(_one_line(prediction)), people)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy of one answer, 0 to 1: as VQAv2's, with both sides normalised alike."""
    return _agreement(_normalise_textvqa(prediction), [_normalise_textvqa(answer) for answer in answers])


def _agreement(prediction: str, people: Sequence[str]) -> float:
    agreeing = people.count(prediction)
    # Left out in turn: those who agree see one less beside them, the others all of them.
    with_them, without = min(1.0, (agreeing - 1) / 3), min(1.0, agreeing / 3)
    return (agreeing * with_them + (len(people) - agreeing) * without) / len(people)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _normalise_textvqa(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _normalise(_one_line(text))


def _normalise(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in _even_punctuation(text).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def _even_punctuation(text: str) -> str:
    """A mark beside a space goes; between letters it becomes a space; a comma between digits makes all of them go."""
    joined = _DIGIT_COMMA.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joined or beside_space else " ")
    return _LONE_PERIOD.sub("", result)
