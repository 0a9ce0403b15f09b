"""What training minimizes: the answers' tokens, and the dense labels of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.demo_model.data import IGNORE, Batch
from tools.demo_model.model import DemoModel, DenseHead, Packing
from tools.demo_model.vocabulary import NUM_OBJECTS

# Most half patches are empty; they count less than those that show something.
EMPTY_WEIGHT = 0.2
TASK_WEIGHTS = (1.0, 0.3, 0.3)
OBJECT_WEIGHT = 0.5
PIECE_WEIGHT = 0.5


@dataclass(frozen=True)
class Loss:
    """A loss to minimize, and the share of right predictions (None without one)."""

    total: Tensor
    characters: Tensor
    tokens: Tensor | None = None
    answers: Tensor | None = None


def _weighted(logits: Tensor, labels: Tensor) -> Tensor:
    weight = logits.new_ones(logits.shape[-1])
    weight[0] = EMPTY_WEIGHT
    return F.cross_entropy(logits, labels, weight)


def dense_loss(logits: Tensor, text_labels: Tensor, object_labels: Tensor) -> Loss:
    """Loss of the dense head's ``[B, 576, ...]`` against ``[B, 24, 48, 3]`` and ``[B, 24, 24]``."""
    logits = logits.float()
    total, offset = logits.new_zeros(()), 0
    right = logits.new_zeros(())
    for task, (size, weight) in enumerate(zip(DenseHead.SIZES, TASK_WEIGHTS, strict=True)):
        # The two halves of a patch are neighbours in a row of labels, as they are in the logits.
        predicted = logits[..., offset : offset + 2 * size].reshape(-1, size)
        labels = text_labels[..., task].reshape(-1)
        total = total + weight * _weighted(predicted, labels)
        if task == 0:
            seen = labels > 0
            right = (predicted.argmax(-1) == labels)[seen].float().mean()
        offset += 2 * size
    objects = logits[..., offset:].reshape(-1, NUM_OBJECTS)
    total = total + OBJECT_WEIGHT * _weighted(objects, object_labels.reshape(-1))
    return Loss(total, right)


def picture_loss(model: DemoModel, features: Tensor, batch: Batch) -> Loss:
    """Loss of everything that the dense head reads off ``features`` ``[B, 576, vision_width]``."""
    dense = dense_loss(model.dense_head(features), batch["text_labels"], batch["object_labels"])
    labels = batch["piece_labels"].view(len(features), -1, 2)
    written = (labels != IGNORE).any(-1)
    logits = model.dense_head.pieces(features[written]).float()
    pieces = F.cross_entropy(logits.flatten(0, 1), labels[written].flatten(), ignore_index=IGNORE)
    return Loss(dense.total + PIECE_WEIGHT * pieces, dense.characters)


def reading_loss(
    model: DemoModel, batch: Batch, head: Tensor, active: tuple[int, ...], dense_weight: float, sparse: bool = False
) -> Loss:
    """Answers' cross entropy plus ``dense_weight`` times the loss of the dense head.

    ``sparse``: the decoder sees only the patches of the batch's ``shown``.
    """
    features = model.vision_tower(batch["image"])
    packing = Packing(batch["ids"], batch["segments"], batch["positions"])
    states = model.read(features, head, packing, active, batch["shown"] if sparse else None)
    wanted = batch["targets"] != IGNORE
    targets = batch["targets"][wanted]
    logits = model.lm_head(states[wanted]).float()
    dense = picture_loss(model, features, batch)
    good = logits.argmax(-1) == targets
    total = F.cross_entropy(logits, targets) + dense_weight * dense.total
    return Loss(total, dense.characters, good.float().mean(), answers_right(good, batch["segments"], wanted))


def vision_loss(model: DemoModel, batch: Batch) -> Loss:
    """The dense loss alone."""
    features = model.vision_tower(batch["image"])
    return picture_loss(model, features, batch)


def answers_right(good: Tensor, segments: Tensor, wanted: Tensor) -> Tensor:
    """Share of answers of which every token is right (each token after the right ones before it)."""
    rows = torch.arange(segments.shape[0], device=segments.device)[:, None].expand_as(segments)
    answer = (rows * (segments.max() + 1) + segments)[wanted]
    missed = torch.zeros(int(answer.max()) + 1, device=good.device).index_add_(0, answer, (~good).float())
    return (missed[torch.unique(answer)] == 0).float().mean()
