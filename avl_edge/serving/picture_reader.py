"""Pictures of requests, decoded within the process's memory; their pixels are counted for as long as anybody has
them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import nullcontext

from ..config import Picture
from ..machine.ledger import Ledger
from ..model.images import DECODING_BYTES_PER_PIXEL, MAX_PIXELS, Shown
from ..model.prompt import Processor
from ..request import Prompt


class PictureReader:
    """Reads what a ``processor`` has laid out, under the entries ``decoding`` and ``pixels`` of ``ledger``.

    Any thread may call it. Where memory is bounded, one picture is decoded at a time.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._decoding, self._pixels = ledger["decoding"], ledger["pixels"]
        self._turn = threading.Lock()

    @property
    def max_pixels(self) -> int:
        """The most that a picture may have."""
        limit = self._decoding.limit
        return MAX_PIXELS if limit is None else min(MAX_PIXELS, limit // DECODING_BYTES_PER_PIXEL)

    def measure(self, processor: Processor, images: Sequence[Shown]) -> list[Picture]:
        """:meth:`~avl_edge.model.prompt.Processor.measure`."""
        with nullcontext() if self._decoding.limit is None else self._turn:
            return processor.measure(images, self.max_pixels)

    def pixel_bytes(self, processor: Processor, pictures: Sequence[Picture]) -> int:
        """What pictures take while they are read: in two arrangements, as they are cut and as the encoder takes
        them."""
        return 2 * sum(map(processor.pixel_bytes, pictures))

    def __call__(
        self, processor: Processor, images: Sequence[Shown], pictures: Sequence[Picture], laid_out: Prompt
    ) -> Prompt:
        """:meth:`~avl_edge.model.prompt.Processor.read`. Raises :class:`TooLarge` and :class:`Busy` where there is no
        memory for the pixels, before any is decoded."""
        nbytes, holder = self.pixel_bytes(processor, pictures), object()
        if not images:
            return processor.read(images, pictures, laid_out)
        what = "one picture" if len(images) == 1 else f"{len(images)} pictures"
        try:
            self._pixels.hold(holder, nbytes, f"the pixels of {what}")
            with nullcontext() if self._decoding.limit is None else self._turn:
                prompt = self._decode(processor, images, pictures, laid_out)
            assert prompt.pixel_values is not None
            self._pixels.hold(holder, prompt.pixel_values.nbytes, "")
            weakref.finalize(prompt.pixel_values, self._pixels.release, holder).atexit = False
        except BaseException:
            self._pixels.release(holder)
            raise
        return prompt

    def _decode(
        self, processor: Processor, images: Sequence[Shown], pictures: Sequence[Picture], laid_out: Prompt
    ) -> Prompt:
        holder = object()
        try:
            self._decoding.hold(holder, self._decoding.limit or 0, "")
            return processor.read(images, pictures, laid_out, self.max_pixels)
        finally:
            self._decoding.release(holder)
