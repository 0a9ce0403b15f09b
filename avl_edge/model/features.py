"""Features of pictures that were encoded lately, so that the next question about one does not encode it again."""

from __future__ import annotations

from collections import OrderedDict

from ..machine.ledger import Entry
from ..request import Prompt
from .network.image_features import ImageFeatures


class FeatureCache:
    """The features of the prompts' pictures that were asked about last, as many as the
    bytes of ``entry`` hold; those of a prompt that are more than that alone are not kept.

    Found again by the digests of all pictures of a prompt together: on some devices pictures that were encoded in other
    company differ in their last bits, and an answer must not depend on what was asked before it.
    """

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._kept: OrderedDict[tuple[str, ...], ImageFeatures] = OrderedDict()

    def forget(self) -> None:
        """Give their memory back."""
        self._kept.clear()
        self._entry.clear()

    def find(self, prompt: Prompt) -> ImageFeatures | None:
        """Those of a prompt's pictures, if they are there."""
        return self._kept.get(_digests(prompt))

    def keep(self, prompt: Prompt, features: ImageFeatures) -> None:
        """Keep those of a prompt's pictures, as the latest. Others go, the least recently used first, as far as the
        entry's limit asks."""
        key, limit = _digests(prompt), self._entry.limit
        self._drop(key)
        if limit is not None and features.nbytes > limit:
            return
        while self._kept and not self._entry.fits(features.nbytes):
            self._drop(next(iter(self._kept)))
        self._entry.hold(key, features.nbytes, "what the pictures were encoded to")
        self._kept[key] = features

    def _drop(self, key: tuple[str, ...]) -> None:
        self._kept.pop(key, None)
        self._entry.release(key)


def _digests(prompt: Prompt) -> tuple[str, ...]:
    return tuple(span.digest for span in prompt.spans)
