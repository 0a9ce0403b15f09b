"""What a request is planned to hold: its options, its budget, the target and the device's profile become one
setting."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..backends.stored import BYTES_AT_ONCE, CONVERSION_COPIES
from ..backends.target import Target
from ..config import Formats, KvShape, Options, Picture, PromptShape, format_size, require
from ..errors import BadInput, TooLarge
from ..kv import quality
from ..kv.budget import KvPlan, fit, kv_plan
from ..kv.layout import PAGE_ROWS, can_hold, page_bytes
from ..kv.methods import Choice, Full, Method
from ..kv.quality import Preset
from ..model.known import shape_of_spec
from ..model.sizes import ModelShape
from ..model.spec import ModelSpec
from .device_watcher import DeviceState
from .process_memory import ProcessMemory, Workspace

DEFAULT_STREAMS = 4
_DEFAULT_POOL_LIMIT = 4 * 2**30
_MEGAPIXEL = (1000, 1000)
"""The picture for whose pixels there is room in every process."""
PACKED = tuple(Formats(name, name, name) for name in ("int8", "int8/int4", "int4"))
"""What an image session's budget tries after exact rows: packing loses less than anything else (docs/quality.md)."""


@dataclass(frozen=True)
class RequestPlanner:
    """Plans for one model on one target."""

    target: Target
    spec: ModelSpec
    shape: KvShape

    def pool_pages(self, pool_bytes: int | None) -> int:
        """How many pages a pool of ``pool_bytes`` has; None takes four full contexts, 4 GiB at most."""
        page, most = page_bytes(self.shape), self.target.most_rows
        if pool_bytes is None:
            context = self.spec.text.context * self.shape.layers * self.shape.row_bytes
            pages = min(DEFAULT_STREAMS * -(-context // page), _DEFAULT_POOL_LIMIT // page)
            return pages if most is None else min(pages, most // PAGE_ROWS)
        if not isinstance(pool_bytes, int) or pool_bytes < page:
            raise BadInput(
                f"pool_bytes must be a whole number of bytes, at least one page of {page}, not {pool_bytes!r}"
            )
        pages = pool_bytes // page
        if most is not None and pages * PAGE_ROWS > most:
            raise TooLarge(
                f"a pool of {format_size(pool_bytes)} has {pages * PAGE_ROWS} rows, but the model was built for "
                f"{most}: build it with more pool_rows, or ask for less at a time"
            )
        return pages

    def new_tokens(self, length: int, options: Options) -> int:
        """The longest answer to a prompt of so many tokens, cut where the model's context ends.

        Raises :class:`TooLarge` where that leaves no room for one, :class:`BadInput` where ``options`` name tokens that
        the model does not have.
        """
        size = self.spec.text.vocab_size
        if any(token >= size for token in options.logit_bias):
            raise BadInput(f"logit_bias names token {max(options.logit_bias)}, but the model's ids end at {size - 1}")
        room = self.spec.text.context - length
        if room < 1:
            raise TooLarge(
                f"the prompt takes {length} tokens, images included, but the model's context ends at "
                f"{self.spec.text.context}: ask a shorter question or give fewer images"
            )
        return min(options.max_new_tokens, room)

    def process_memory(self, limit: int, process: int) -> ProcessMemory:
        """How a process bounded to ``limit`` bytes divides that held ``process`` before anything was loaded.

        Raises :class:`BadInput` for a target whose memory cannot be bounded, :class:`TooLarge` where not even a prompt
        of one token fits beside the weights.
        """
        require(self.target.cannot_bound_memory is None, self.target.cannot_bound_memory or "")
        model, layer = self.model, self.spec.text.context * self.shape.row_bytes
        memory = ProcessMemory(
            limit,
            process=process,
            libraries=self.target.library_bytes,
            weights=self.target.weight_bytes(model),
            recorded_steps=self.target.recorded_steps_bytes,
            conversions=CONVERSION_COPIES * min(max(BYTES_AT_ONCE, layer), self.shape.layers * layer),
            picture=self.spec.pixel_bytes(self.spec.picture(*_MEGAPIXEL)),
            most_features=self.most_features,
        )
        memory.require(self.workspace(PromptShape(1, 0, 0), 0).prompt_bytes, page_bytes(self.shape), "the model")
        return memory

    @property
    def most_features(self) -> int:
        """Bytes of the features of a context full of pictures."""
        width = (1 + self.model.vision.deep) * self.spec.text.hidden_size
        return self.spec.text.context * width * self.shape.itemsize

    @property
    def model(self) -> ModelShape:
        """The model by its sizes."""
        return shape_of_spec(self.spec, self.target.directory.name, self.shape.itemsize, self.target.weight_formats)

    def workspace(self, prompt: PromptShape, steps: int, pictures: Sequence[Picture] | None = None) -> Workspace:
        """What a request takes beside its rows, with so many ``steps`` after its prompt. ``pictures``: those that have
        its image tokens (None: those that take the most)."""
        model, tokens = self.model, prompt.length + steps + 1
        pictures = model.picture.heaviest(prompt.images) if pictures is None else pictures
        step = model.step_workspace_bytes(tokens)
        # A step reads as many rows as a prompt of all its tokens has, a layer at a time.
        return Workspace(self.target.workspace_bytes(model, pictures, tokens, prompt.images) + step, step)

    @property
    def longest(self) -> PromptShape:
        """The prompt that takes most: a full context, of pictures as far as they go."""
        images = sum(each.tokens for each in self.spec.picture.heaviest(self.spec.text.context - 1))
        return PromptShape(1, images, self.spec.text.context - 1 - images)

    def plan(
        self,
        pool_pages: int,
        options: Options,
        prompt: PromptShape,
        steps: int,
        state: DeviceState | None = None,
        left: int | None = None,
    ) -> KvPlan[Method]:
        """The first settings that keep the budget and, where there is a device's profile, its target, best answers
        first. ``steps`` follow the prompt; a profile gives no more than the pool has. ``left``: bytes that a request
        without a budget may hold; None: no bound but the pool.

        Raises :class:`BadInput` for options that contradict themselves or that the target does not serve, and
        :class:`TooLarge`.
        """
        preset = self.preset(options.preset, prompt) if options.preset else None
        settings = preset.choices() if preset else self._settings(options, prompt)
        self.target.check_prompt(prompt, self.spec)
        if preset:
            plan = self._of_preset(preset, settings, options.kv_budget_bytes, prompt, steps)
        else:
            plan = self._within(state, pool_pages, options, settings, prompt, steps, left)
        self.target.check(Choice(plan.method, plan.formats), prompt, self.spec)
        return plan

    def preset(self, name: str, prompt: PromptShape) -> Preset:
        """The preset of that name, of the settings that the target serves; :class:`BadInput` if there is none."""
        return quality.preset(name, self._served(prompt))

    @property
    def packed(self) -> list[Formats]:
        """Those of :data:`PACKED` that this model's rows can have here."""
        text = PromptShape(1, 0, 0)
        return [
            each
            for each in PACKED
            if can_hold(each, self.shape) and self.target.serves(Choice(Full(), each), text, self.spec)
        ]

    def _settings(self, options: Options, prompt: PromptShape) -> Iterator[Choice]:
        fitted = options.kv_budget_bytes is not None
        found = quality.choices(options.method, options.parameters, fitted, options.formats, self.shape)
        # Looked at now, so that what contradicts itself is said before what does not fit.
        first = next(found)
        found = itertools.chain([first], found)
        if options.method:
            return found
        if options.formats:
            self.target.check(first, prompt, self.spec)  # full attention: what is not served are the formats
        return filter(self._served(prompt), found)  # nobody asked for what is not

    def _served(self, prompt: PromptShape) -> Callable[[Choice], bool]:
        return lambda choice: self.target.serves(choice, prompt, self.spec)

    def _of_preset(
        self, preset: Preset, settings: Iterator[Choice], budget: int | None, prompt: PromptShape, steps: int
    ) -> KvPlan[Method]:
        # A share is one of a picture's rows: of a text alone there is nothing to leave out.
        if preset.share is None or not prompt.images:
            return fit(settings, self.shape, prompt, steps, budget)
        found = quality.at_share(list(settings), preset.share, prompt, self.shape, f"the preset {preset.name}")
        return kv_plan(found.method, found.formats, self.shape, prompt, steps)

    def _within(
        self,
        state: DeviceState | None,
        pool_pages: int,
        options: Options,
        settings: Iterator[Choice],
        prompt: PromptShape,
        steps: int,
        left: int | None,
    ) -> KvPlan[Method]:
        """By the budget; without one by the profile of the device and by what is left: a method's own defaults where
        they fit, then what fits."""
        budget = options.kv_budget_bytes
        if budget is None:
            bounds = [] if left is None else [left]
            if state and state.kv_budget is not None:
                bounds.append(min(state.kv_budget, pool_pages * page_bytes(self.shape)))
            if bounds:
                budget = min(bounds)
                settings = itertools.chain(settings, self._settings(replace(options, kv_budget=budget), prompt))
        in_time = state.in_time(settings, prompt, steps) if state else settings
        return fit(in_time, self.shape, prompt, steps, budget)
