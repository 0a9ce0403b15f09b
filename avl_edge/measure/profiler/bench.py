"""A model on this machine, measured with requests of random tokens and pixels: the runtime's own backend and caches,
no tokenizer, and no end before the last step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...backends.cpu.backend import TorchBackend
from ...backends.decode_loop import DecodeLoop
from ...config import Formats, Options, Progress, PromptShape
from ...kv.budget import kv_plan
from ...kv.cache import SequenceCache, prompt_shape
from ...kv.methods import H2O, Avl, FastV, Full, Method, Streaming
from ...machine import allocator
from ...model import checkpoint
from ...model.families import read_spec
from ...model.known import shape_of_spec
from ...model.prompt.codec import open_codec
from ...model.sampling import Sampler
from ...model.sizes import ModelShape
from ...model.vision_language import VisionLanguageModel
from ...request import ImageSpan, Pixels, PixelValues, Prompt
from .timing import forget_peak, now, peak_bytes, per_step, timed

SIDE = 336
"""Edge in pixels of the pictures."""
CYCLE = 3
"""A-VL's refresh interval: steps are averaged over whole cycles."""


@dataclass(frozen=True)
class Trial:
    """Requests of one kind to measure: ``streams`` of them, ``images`` pictures and ``text`` tokens each."""

    method: Method
    images: int
    text: int
    steps: int
    streams: int

    def prompt(self, tokens_per_image: int) -> PromptShape:
        """A third of the text stands before the image."""
        before = self.text // 3 if self.images else self.text
        return PromptShape(before, self.images * tokens_per_image, self.text - before)

    def __str__(self) -> str:
        settings = f"{self.method.name}, {self.images} images, {self.text} text tokens"
        return f"{settings}, {self.steps} steps, {self.streams} streams"


@dataclass(frozen=True)
class Measured:
    """Milliseconds, undisturbed, and the most resident bytes of the process. ``encode_ms`` 0: no picture."""

    encode_ms: float
    prefill_ms: float
    ms_per_token: float
    peak_bytes: int


def trials(model: ModelShape, count: int, seed: int) -> Iterator[Trial]:
    """``count`` random requests that fit the model's context."""
    chance = random.Random(seed)
    per_image = model.picture(SIDE, SIDE).tokens
    context = model.decoder.context
    for number in range(count):
        steps = CYCLE * chance.randint(6, 12)
        most = max(0, min(3, (context - steps - 16) // per_image))
        images = chance.randint(0, most)
        room = context - images * per_image - steps - 1
        text = chance.randint(8, max(8, min(240, room)))
        yield Trial(_method(chance, number), images, text, steps, chance.choice((1, 1, 2, 3)))


def _method(chance: random.Random, number: int) -> Method:
    """Each of the methods in turn, A-VL most often, with random settings."""
    s = chance.randint(20, 90)
    avl = Avl(max(s, 90), s, max(1, s * 2 // 3), CYCLE, chance.choice((50, 70, 100)))
    choices: tuple[Method, ...] = (Full(), avl, H2O(chance.randint(20, 90)), avl, FastV(drop=chance.randint(10, 80)))
    return (*choices, Streaming(4, chance.randint(64, 1020)))[number % 6]


class Bench:
    """A checkpoint, loaded and ready to be measured. ``name`` is the model's in profiles."""

    def __init__(self, directory: Path, name: str, progress: Progress | None = None) -> None:
        allocator.bound()
        self.spec = read_spec(directory)
        self._codec = open_codec(self.spec, directory)
        self._model = VisionLanguageModel(self.spec, checkpoint.load_weights(directory, progress, self.spec.prefixes))
        self.dtype = self._model.dtype
        self.shape = shape_of_spec(self.spec, name, self.dtype.itemsize)

    def measure(self, trial: Trial) -> Measured:
        """Run the requests of ``trial``: each prompt by itself, then all decoded together."""
        forget_peak()
        inputs = self._prompt(trial)
        prompt, kv = prompt_shape(len(inputs), inputs.spans), self.shape.kv_shape()
        plan = kv_plan(trial.method, Formats(), kv, prompt, trial.steps)
        sampler = Sampler(Options())
        with DecodeLoop(TorchBackend.with_pages(self._model, plan.pages * trial.streams)) as loop:
            caches = [loop.add(inputs, plan) for _ in range(trial.streams)]
            encode, prefill, logits = zip(*(_prefill(loop, inputs, cache) for cache in caches), strict=True)
            tokens = [sampler(each) for each in logits]

            def step() -> None:
                tokens[:] = [sampler(each) for each in loop.decode(tokens)]

            steps = [timed(step) for _ in range(trial.steps)]
        # Of few times the fastest is the one that nobody disturbed.
        return Measured(min(encode), min(prefill), per_step(steps, CYCLE), peak_bytes())

    def _prompt(self, trial: Trial) -> Prompt:
        picture, chance = self.spec.picture(SIDE, SIDE), np.random.default_rng(trial.text)
        shape, each = trial.prompt(picture.tokens), picture.tokens
        images = (chance.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(trial.images))
        pixels = tuple(
            PixelValues(self._codec.pixels(Image.fromarray(image), picture, SIDE**2), picture) for image in images
        )
        spans = tuple(ImageSpan("", shape.prefix + image * each, each) for image in range(trial.images))
        ids = tuple(map(int, chance.integers(0, self.spec.text.vocab_size, shape.length)))
        rope = self._codec.rope(len(ids), [(span.start, picture) for span in spans])
        return Prompt(ids, spans, Pixels(pixels) if pixels else None, rope)


def _prefill(loop: DecodeLoop, inputs: Prompt, cache: SequenceCache) -> tuple[float, float, Tensor]:
    """Milliseconds to encode the pictures (0: there are none) and for the prompt, and its last token's logits."""
    start = now()
    features = loop.encode(inputs)
    encoded = now()
    logits = loop.run(inputs, features, cache)
    return 1000 * (encoded - start) if features is not None else 0.0, 1000 * (now() - encoded), logits


def warm_up(bench: Bench) -> None:
    """Load what libraries load on their first use."""
    for trial in trials(bench.shape, 2, seed=0):
        bench.measure(replace(trial, streams=1, steps=CYCLE))


def threads() -> int:
    """CPU threads in use."""
    return torch.get_num_threads()
