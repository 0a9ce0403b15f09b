"""What a method is: settings that are checked and counted, and all that the rest of the runtime has to know about them.

A method is one file with one frozen dataclass (its settings) and the policy that the dataclass makes, one per request
(:mod:`.policy`). Methods share the names of their parameters: ``secondary`` is the percentage of image rows stored per
layer and ``core`` the percentage read on an ordinary step, whoever takes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, NamedTuple, TypeVar

from ...config import Formats, PromptShape
from .policy import Policy

Number = TypeVar("Number", int, float)


class Parameter(NamedTuple):
    """A parameter of a method as people see it. ``symbol``: the published one, or empty; ``is_layer``: it is one of
    the model's layers."""

    name: str
    default: float
    help: str
    symbol: str
    is_layer: bool


def parameter(default: Number, help: str, symbol: str = "", *, is_layer: bool = False) -> Number:
    """A field of a method's settings; ``help`` is one line, in lower case and without a full stop. ``is_layer``: its
    values are those of a model's layers, from 0."""
    about = {"default": default, "help": help, "symbol": symbol, "is_layer": is_layer}
    return field(default=default, metadata=about)


class TierPeaks(NamedTuple):
    """Upper bounds of the rows that each tier holds at any time, over all layers. They need not be reached together."""

    text: int
    core: int
    secondary: int


def mixed_peaks(total: int, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
    """For methods that hold text and image rows to one budget of ``total`` rows: either may fill it."""
    text = layers * (prompt.prefix + prompt.suffix + steps)
    return TierPeaks(min(total, text), min(total, layers * prompt.images), 0)


@dataclass(frozen=True)
class Tiers:
    """Rows of one layer. ``core`` and ``secondary`` are image rows; ``freed`` are rows that are no longer held."""

    text: int
    core: int
    secondary: int
    freed: int

    @classmethod
    def of(cls, prompt: PromptShape, steps: int, text: int, images: int, core: int | None = None) -> Tiers:
        """``text`` and ``images`` rows stored of a prompt and ``steps`` tokens; of the images' ``core``, None: all."""
        core = images if core is None else core
        return cls(text, core, images - core, prompt.length + steps - text - images)

    @property
    def stored(self) -> int:
        return self.text + self.core + self.secondary


def images_among(prompt: PromptShape, begin: int, end: int) -> int:
    """Image tokens among the positions ``begin .. end - 1``, images being one run of tokens after the prefix."""
    return max(0, min(end, prompt.prefix + prompt.images) - max(begin, prompt.prefix))


@dataclass(frozen=True)
class Method(ABC):
    """The settings of a method: a frozen dataclass whose fields are made by :func:`parameter`, and checked by
    ``__post_init__``.

    ``name`` is what people call it by, ``summary`` one line, ``source`` where it is published; ``formats`` are those
    of its tiers where none are given. ``shared_with`` says with which parameters several questions may share its rows
    ("avl with prefill_keep=100 ..."); empty where none are needed, or none would do.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    formats: ClassVar[Formats] = Formats()
    shared_with: ClassVar[str] = ""

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """What may be set, in the order of the fields."""
        made = (each for each in fields(cls) if "help" in each.metadata)
        return tuple(Parameter(each.name, **each.metadata) for each in made)

    @classmethod  # noqa: B027
    def check_formats(cls, formats: Formats) -> None:
        """Raise :class:`~avl_edge.errors.BadInput` for formats in which the method cannot hold its rows."""

    def peak_rows(self, prompt: PromptShape, steps: int, layers: int) -> int:
        """The most rows, over all layers, that a request holds at any time within ``steps`` decode steps. Exact: it is
        what a request is promised. Here: what the tiers hold at most, for methods whose tiers peak together."""
        return sum(self.peak_tiers(prompt, steps, layers))

    @abstractmethod
    def peak_tiers(self, prompt: PromptShape, steps: int, layers: int) -> TierPeaks:
        """The same, tier by tier: what each needs where their rows weigh differently."""

    @abstractmethod
    def tiers(self, prompt: PromptShape, steps: int, layer: int) -> Tiers:
        """The rows that ``layer`` holds after the prompt and ``steps`` decode steps, settled: the count on the way, for
        predictions of time and for people. Images are taken as one run of tokens between ``prefix`` and ``suffix``."""

    def tokens_in(self, prompt: PromptShape, layer: int) -> int:  # noqa: ARG002
        """The prompt's tokens that go through ``layer`` in prefill: all, unless the method prunes."""
        return prompt.length

    @property
    def shared_percent(self) -> float | None:
        """The percentage of image rows that each layer stores whatever is asked, so that several questions may share
        them: all, or those whose values stand out (as :class:`.distinct.Distinct`, whose ``secondary`` this is). None
        where the rows depend on the question, or go later."""
        return None

    @abstractmethod
    def policy(self, prompt: PromptShape, layers: int) -> Policy:
        """The policy of one request."""

    @classmethod
    @abstractmethod
    def ladder(cls, fixed: Mapping[str, float]) -> Iterator[Method]:
        """Settings to try for a budget, best answers first; ``fixed`` parameters stay as given."""
