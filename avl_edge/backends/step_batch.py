"""The sequences of one decode step, and what came of it: what fails for one of them ends that one alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..kv.cache import SequenceCache
from ..kv.pool.rows import Ids

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """What a step gives for each of its sequences, in their order: the likeliest ``tokens`` of a greedy step, else
    ``logits`` ``[sequences, vocabulary]``, where they were computed.

    ``failures``, by the sequence's number in the step: those whose policy raised. Nothing else of them counts, and
    their rows are in no order: drop them.
    """

    tokens: Sequence[int] = ()
    logits: Tensor | None = None
    failures: Mapping[int, Exception] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[tuple[int, StepResult]]) -> StepResult:
        """Steps of parts of a batch as one, each with the number of its first sequence."""
        logits = [part.logits for _, part in parts if part.logits is not None]
        return cls(
            [token for _, part in parts for token in part.tokens],
            torch.cat(logits) if logits else None,
            {first + number: error for first, part in parts for number, error in part.failures.items()},
        )


class StepBatch:
    """The sequences whose step has begun: ``token_ids`` and ``caches``, ``positions`` and ``slots`` (int32 ``[layers]``
    each) of their new rows.

    What a policy is asked goes through :meth:`ask` or :meth:`attempt`, which keep what it raises.
    """

    def __init__(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> None:
        self._size = len(caches)
        self._failures: dict[int, Exception] = {}
        self._numbers = list(range(self._size))
        self.token_ids, self.caches = list(token_ids), list(caches)
        self.positions: list[int] = []
        self.slots: list[Ids] = []
        begun = self.ask(lambda cache: cache.begin_step())
        self.positions = [position for position, _ in begun]
        self.slots = [slots for _, slots in begun]

    def ask(self, question: Callable[[SequenceCache], T]) -> list[T]:
        """Every sequence's answer, before anything is computed; one that raises is no longer in the batch."""
        answers: list[T] = []
        sound: list[int] = []
        for at, (number, cache) in enumerate(zip(self._numbers, self.caches, strict=True)):
            try:
                answers.append(question(cache))
                sound.append(at)
            except Exception as error:
                self._failures[number] = error
        if len(sound) < len(self.caches):
            for name in ("_numbers", "token_ids", "caches", "positions", "slots"):
                values = getattr(self, name)
                setattr(self, name, [values[at] for at in sound] if values else values)
        return answers

    def attempt(self, at: int, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | None:
        """``function`` for the sequence at that place of the batch, which goes on being computed. None where it, or an
        earlier one for this sequence, raised."""
        number = self._numbers[at]
        if number in self._failures:
            return None
        try:
            return function(*arguments, **named)
        except Exception as error:
            self._failures[number] = error
            return None

    def result(self, tokens: Sequence[int] = (), logits: Tensor | None = None) -> StepResult:
        """The outcome, from what was computed for the sequences that are still in the batch."""
        if len(self._numbers) < self._size:
            spread = dict(zip(self._numbers, tokens, strict=False))
            tokens = [spread.get(number, 0) for number in range(self._size)] if tokens else tokens
            if logits is not None:
                chosen = torch.tensor(self._numbers, dtype=torch.int64, device=logits.device)
                logits = logits.new_zeros(self._size, logits.shape[-1]).index_copy_(0, chosen, logits)
        return StepResult(tokens, logits, self._failures)
