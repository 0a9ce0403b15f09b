"""Features of pictures that were encoded lately, so that the next question about one does not encode it again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..request import Prompt

_KEPT = 4


class FeatureCache:
    """The features of the last few prompts' pictures.

    Found again by the digests of all pictures of a prompt together: pictures that were encoded in other company may
    differ in their last bits, and an answer must not depend on what was asked before it.
    """

    def __init__(self, encode: Callable[[npt.NDArray[np.float32]], Tensor]) -> None:
        self._encode = encode
        self._kept: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()

    def forget(self) -> None:
        """Give their memory back."""
        self._kept.clear()

    def __call__(self, prompt: Prompt) -> Tensor | None:
        """Features ``[images, tokens, hidden]``; None for a prompt without pictures."""
        if prompt.pixel_values is None:
            return None
        digests = tuple(span.digest for span in prompt.spans)
        features = self._kept.get(digests)
        if features is None:
            features = self._encode(prompt.pixel_values)
        self._kept[digests] = features
        self._kept.move_to_end(digests)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return features
