"""Training samples: one picture, its dense labels, and many questions packed into one sequence."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from tools.demo_model.facts import Facts
from tools.demo_model.questions import KINDS, LONG, Question, ask, ask_any
from tools.demo_model.scenes import render
from tools.demo_model.tokenizer import BOS, EOS, HEAD, PAD, special_id, turn
from tools.demo_model.vocabulary import CHARACTERS

IGNORE = -100
TEXT_LENGTH = 288
# Patches of a picture that sparse stages show to the decoder: all that hold something, and others up to this number.
SHOWN = 128
# What is learned last, because an answer joins two places of the picture or has many characters: every second question.
SLOW = ("distance", "compare places", "plate", "time", "screen line", "destination", "colour count")
Labels = npt.NDArray[np.int64]
Sample = dict[str, npt.NDArray[np.generic]]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Packed:
    """Questions of one picture in one row of ``length`` positions, each blind to the others.

    All arrays are int64 ``[length]``. ``segments`` numbers the questions, -1 is padding; ``positions`` restarts at 0 in
    every question; ``targets`` holds the next token where an answer is learned and IGNORE elsewhere.
    """

    ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    kinds: tuple[str, ...]


@lru_cache(maxsize=2)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def head_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens in front of the picture."""
    return [special_id(tokenizer, BOS), *tokenizer.encode(HEAD, add_special_tokens=False).ids]


def encode(question: Question, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the question's turn and of its answer with the end token."""
    prompt = tokenizer.encode(turn(question.text), add_special_tokens=False).ids
    answer = tokenizer.encode(f" {question.answer}", add_special_tokens=False).ids
    return prompt, [*answer, special_id(tokenizer, EOS)]


def pack(questions: list[Question], tokenizer: Tokenizer, length: int = TEXT_LENGTH) -> Packed:
    """Pack ``questions`` in order; one that does not fit is left out."""
    ids = np.full(length, special_id(tokenizer, PAD), np.int64)
    targets = np.full(length, IGNORE, np.int64)
    segments = np.full(length, -1, np.int64)
    positions = np.zeros(length, np.int64)
    kinds: list[str] = []
    start = 0
    for question in questions:
        prompt, answer = encode(question, tokenizer)
        row = prompt + answer[:-1]
        end = start + len(row)
        if end > length:
            continue
        ids[start:end] = row
        targets[start + len(prompt) - 1 : end] = answer
        segments[start:end] = len(kinds)
        positions[start:end] = np.arange(len(row))
        kinds.append(question.kind)
        start = end
    return Packed(ids, targets, segments, positions, tuple(kinds))


def piece_labels(text_labels: Labels, tokenizer: Tokenizer) -> Labels:
    """``[24, 48, 3]`` -> ``[24, 48]``: the token that an answer with the field's text has at that character.

    IGNORE where nothing is written.
    """
    labels = np.full(text_labels.shape[:2], IGNORE, np.int64)
    fields = text_labels[..., 1]
    for field in np.unique(fields[fields > 0]):
        rows, columns = np.nonzero(fields == field)
        places = text_labels[rows, columns, 2] - 1
        line = [" "] * (int(places.max()) + 1)
        for row, column, place in zip(rows, columns, places, strict=True):
            line[place] = CHARACTERS[text_labels[row, column, 0] - 1]
        encoding = tokenizer.encode(" " + "".join(line), add_special_tokens=False)
        piece_of = {at: id_ for id_, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) for at in range(a, b)}
        labels[rows, columns] = [piece_of[place + 1] for place in places]
    return labels


def shown_patches(text_labels: Labels, object_labels: Labels, rng: random.Random) -> Labels:
    """``[SHOWN]`` ascending patch numbers: those that hold something, as far as they go in, and others by chance."""
    written = (text_labels[..., 0] > 0).reshape(*object_labels.shape, 2).any(-1)
    filled = np.nonzero((written | (object_labels > 0)).reshape(-1))[0].tolist()
    empty = sorted(set(range(object_labels.size)) - set(filled))
    rng.shuffle(empty)
    return np.sort(np.array((filled + empty)[:SHOWN], np.int64))


def training_questions(facts: Facts, rng: random.Random, count: int = 18) -> list[Question]:
    """One long question, then a mixture in which every second one is of a kind that is learned slowly."""
    mixture = [ask_any(facts, rng, kinds=SLOW if index % 2 else KINDS) for index in range(count)]
    return [ask(facts, rng.choice(LONG), rng), *mixture]


class Scenes(Dataset[Sample]):
    """The scenes ``first .. first + count - 1``.

    A sample has ``image`` uint8 ``[336, 336, 3]``, ``text_labels`` ``[24, 48, 3]``, ``object_labels`` ``[24, 24]``,
    ``piece_labels`` ``[24, 48]``, ``shown`` ``[SHOWN]`` and the arrays of ``Packed``.
    """

    def __init__(self, first: int, count: int, tokenizer: Path, length: int = TEXT_LENGTH) -> None:
        self.first, self.count, self.tokenizer, self.length = first, count, tokenizer, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        seed = self.first + index
        scene = render(seed)
        tokenizer, rng = _tokenizer(self.tokenizer), random.Random(seed ^ 0x5EED)
        packed = pack(training_questions(scene.facts, rng), tokenizer, self.length)
        sample: Sample = {
            "image": np.array(scene.image),
            "text_labels": scene.text_labels,
            "object_labels": scene.object_labels,
            "piece_labels": piece_labels(scene.text_labels, tokenizer),
            "shown": shown_patches(scene.text_labels, scene.object_labels, rng),
        }
        return sample | {name: getattr(packed, name) for name in ("ids", "targets", "segments", "positions")}


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group, but it is the trainer who saves and stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(scenes: Scenes, batch_size: int, workers: int) -> DataLoader[Sample]:
    """Batches in seed order, the same for any number of workers."""
    return DataLoader(
        scenes,
        batch_size=batch_size,
        num_workers=workers,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )
