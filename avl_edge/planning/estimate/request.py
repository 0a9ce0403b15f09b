"""What is asked of a device: a request by its sizes, and the two constraints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from ...config import Formats, Options, Picture, PromptShape, require
from ...errors import BadInput
from ...model.sizes import ModelShape, Precision

_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class PlanRequest:
    """Requests of one kind, ``streams`` of them at a time.

    ``image_size``: (width, height) in pixels of each of the ``images``. ``image_tokens``: all image tokens of the
    prompt, where they are known (None: from the pictures). ``prompt_tokens``: text tokens of the prompt, of which
    ``system_tokens`` stand before the first image. ``method``, ``parameters`` and ``formats`` as in
    :class:`avl_edge.Options`; what is left out is chosen. ``weights``: formats of the decoder's matrices (None: the
    checkpoint's own). ``max_memory``: bytes for the whole process (None: what the device has);
    ``target_ms_per_token``: of one decode step of all streams together, on average (None: as it comes).
    """

    images: int = 1
    image_size: tuple[int, int] = (1280, 960)
    image_tokens: int | None = None
    prompt_tokens: int = 71
    system_tokens: int = 35
    max_new_tokens: int = Options.max_new_tokens
    streams: int = 1
    method: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    formats: Formats | None = None
    weights: Precision | None = None
    max_memory: int | None = None
    target_ms_per_token: float | None = None

    def __post_init__(self) -> None:
        require(0 <= self.images <= 1000, f"images must be from 0 to 1000, not {self.images}")
        require(1 <= min(self.image_size) <= max(self.image_size) <= 2**16, "image_size must be from 1 to 65536 pixels")
        tokens = (("image_tokens", self.image_tokens or 0, 0), ("prompt_tokens", self.prompt_tokens, 1))
        for name, count, least in (*tokens, ("max_new_tokens", self.max_new_tokens, 1)):
            require(least <= count <= _MOST_TOKENS, f"{name} must be from {least} to {_MOST_TOKENS}, not {count}")
        require(
            0 <= self.system_tokens <= self.prompt_tokens,
            f"system_tokens ({self.system_tokens}) are those of the prompt_tokens ({self.prompt_tokens}) that stand "
            f"before the first image: there must be 0 or more, and no more than in all",
        )
        require(1 <= self.streams <= 10_000, f"streams must be from 1 to 10000, not {self.streams}")
        require(self.max_memory is None or self.max_memory > 0, "max_memory must be more than 0 bytes")
        target = self.target_ms_per_token
        require(target is None or 0 < target < 1e9, f"target_ms_per_token must be above 0 and finite, not {target}")

    def pictures(self, model: ModelShape) -> tuple[Picture, ...]:
        """What the vision encoder gets: nothing where the prompt is said to hold no image tokens."""
        return () if self.image_tokens == 0 else (model.picture(*self.image_size),) * self.images

    def prompt(self, model: ModelShape) -> PromptShape:
        """The prompt's tokens; :class:`BadInput` when not one new token fits the model's context after them."""
        images = self.image_tokens
        if images is None:
            images = sum(picture.tokens for picture in self.pictures(model))
        before = self.system_tokens if images else self.prompt_tokens
        lengths = [each.tokens for each in self.pictures(model)] if self.image_tokens is None else []
        starts = accumulate(lengths[:-1], initial=before)
        places = tuple(zip(starts, lengths, strict=True)) if len(lengths) > 1 else ()
        prompt = PromptShape(before, images, self.prompt_tokens - before, places)
        if prompt.length >= model.decoder.context:
            raise BadInput(
                f"the prompt takes {prompt.length} tokens, {images} of them for images, but the context of "
                f"{model.name} ends at {model.decoder.context}: give fewer or smaller images"
            )
        return prompt

    def steps(self, model: ModelShape) -> int:
        """Decode steps after the prompt: one less than new tokens, cut where the model's context ends."""
        return min(self.max_new_tokens, model.decoder.context - self.prompt(model).length) - 1
