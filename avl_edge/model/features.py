"""Features of pictures that were encoded lately, so that the next question about one does not encode it again."""

from __future__ import annotations

from collections import OrderedDict

from ..request import Prompt
from .network.image_features import ImageFeatures

_KEPT = 4


class FeatureCache:
    """The features of the last few prompts' pictures.

    Found again by the digests of all pictures of a prompt together: on some devices pictures that were encoded in other
    company differ in their last bits, and an answer must not depend on what was asked before it.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, ...], ImageFeatures] = OrderedDict()

    def forget(self) -> None:
        """Give their memory back."""
        self._kept.clear()

    def find(self, prompt: Prompt) -> ImageFeatures | None:
        """Those of a prompt's pictures, if they are there."""
        return self._kept.get(_digests(prompt))

    def keep(self, prompt: Prompt, features: ImageFeatures) -> None:
        """Keep those of a prompt's pictures, as the latest."""
        self._kept[_digests(prompt)] = features
        self._kept.move_to_end(_digests(prompt))
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)


def _digests(prompt: Prompt) -> tuple[str, ...]:
    return tuple(span.digest for span in prompt.spans)
