"""How many rows a layer holds in each tier, and how many prompt tokens reach it: one formula a method.

A method's own ``peak_rows`` is the promise; these are the counts on the way, for predictions of time and for people.
Images are taken as one run of tokens between ``prefix`` and ``suffix``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, singledispatch

from ...config import PromptShape
from ...kv.methods import H2O, AttentionPack, Avl, Coarse, Distinct, FastV, Full, Method, Random, Streaming, base

# Exact percents are slow arithmetic, and a search for a plan asks for the same ones over and over.
share = lru_cache(maxsize=4096)(base.share)


@dataclass(frozen=True)
class Tiers:
    """Rows of one layer. ``core`` and ``secondary`` are image rows; ``freed`` are rows that are no longer held."""

    text: int
    core: int
    secondary: int
    freed: int

    @property
    def stored(self) -> int:
        return self.text + self.core + self.secondary


@singledispatch
def tiers(method: Method, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG001
    """The rows that ``layer`` holds after the prompt and ``steps`` decode steps, settled."""
    raise TypeError(f"the tiers of {method.name} cannot be counted here yet: add its formula beside the others")


@singledispatch
def tokens_in(method: Method, prompt: PromptShape, layer: int) -> int:  # noqa: ARG001
    """The prompt's tokens that go through ``layer`` in prefill: all, unless the method prunes."""
    return prompt.length


def _tiers(prompt: PromptShape, steps: int, text: int, images: int, core: int | None = None) -> Tiers:
    core = images if core is None else core
    return Tiers(text, core, images - core, prompt.length + steps - text - images)


@tiers.register
def _(method: Full, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG001
    return _tiers(prompt, steps, prompt.prefix + prompt.suffix + steps, prompt.images)


@tiers.register
def _(method: Avl, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG001
    text = prompt.prefix + method.text_budget(prompt.suffix + steps)
    return _tiers(prompt, steps, text, share(prompt.images, method.secondary), share(prompt.images, method.core))


@tokens_in.register
def _(method: Avl, prompt: PromptShape, layer: int) -> int:
    survivors = share(prompt.images, method.prefill_keep)
    return prompt.length - (prompt.images - survivors if layer > method.prune_layer else 0)


@tiers.register
def _(method: AttentionPack, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG001
    text = prompt.prefix + prompt.suffix + steps
    return _tiers(prompt, steps, text, prompt.images, share(prompt.images, method.core))


@tiers.register(Distinct)
@tiers.register(Random)
def _(method: Distinct | Random, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG001
    text = prompt.prefix + prompt.suffix + steps
    return _tiers(prompt, steps, text, share(prompt.images, method.secondary))


@tiers.register
def _(method: Coarse, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG001
    """At most C of the image rows are read on a step; a nucleus may be smaller, as only scores can tell."""
    text = prompt.prefix + prompt.suffix + steps
    stored = share(prompt.images, method.secondary)
    return _tiers(prompt, steps, text, stored, min(stored, share(prompt.images, method.core)))


@tiers.register
def _(method: FastV, prompt: PromptShape, steps: int, layer: int) -> Tiers:
    images = tokens_in(method, prompt, layer) - prompt.prefix - prompt.suffix
    return _tiers(prompt, steps, prompt.prefix + prompt.suffix + steps, images)


@tokens_in.register
def _(method: FastV, prompt: PromptShape, layer: int) -> int:
    return prompt.length - (prompt.images - method.kept(prompt.images) if layer >= method.layer else 0)


@tiers.register
def _(method: H2O, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG001
    """The sum is exact; which of the heavy hitters are image rows, only scores can tell: in proportion, here."""
    seen = prompt.length + steps
    held = min(method.rows(prompt.length, steps), seen)
    heavy = share(held, method.heavy) if held < seen else 0
    older = seen - (held - heavy)
    images = _overlap(prompt, older, seen) + heavy * _overlap(prompt, 0, older) // max(older, 1)
    return _tiers(prompt, steps, held - images, images)


@tiers.register
def _(method: Streaming, prompt: PromptShape, steps: int, layer: int) -> Tiers:  # noqa: ARG001
    seen = prompt.length + steps
    sinks = min(int(method.sinks), seen)
    begin = max(sinks, seen - int(method.window))
    images = _overlap(prompt, 0, sinks) + _overlap(prompt, begin, seen)
    return _tiers(prompt, steps, sinks + seen - begin - images, images)


def _overlap(prompt: PromptShape, begin: int, end: int) -> int:
    """Image tokens among the positions ``begin .. end - 1``."""
    return max(0, min(end, prompt.prefix + prompt.images) - max(begin, prompt.prefix))
