"""Where the numbers are computed: images to features, a prompt to rows, a step to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..kv.cache import SequenceCache
from ..kv.shared_prefix import SharedPrefixCache
from ..request import Prompt
from .stored import StoredRows


class Backend(Protocol):
    """What the runtime asks of a device. ``rows`` are those of all sequences, where the device keeps them."""

    name: str
    rows: StoredRows

    def encode_images(self, pixels: npt.NDArray[np.float32]) -> Tensor:
        """float32 ``[images, 3, H, W]`` to features ``[images, tokens, hidden]``."""
        ...

    def prefill(self, prompt: Prompt, features: Tensor | None, cache: SequenceCache) -> Tensor:
        """Run the prompt, leave in ``cache`` what its policy stores; the last token's logits ``[vocabulary]``.

        Of a question over a shared prefix only the tokens from the cache's ``begin`` on are run, without ``features``.
        """
        ...

    def prefill_prefix(self, prompt: Prompt, features: Tensor | None, cache: SharedPrefixCache) -> None:
        """Run a prompt that ends with its images, and leave its rows in ``cache``."""
        ...

    def decode(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> Tensor:
        """One step for every sequence: its newest token in, logits ``[sequences, vocabulary]`` out."""
        ...

    def decode_greedy(self, token_ids: Sequence[int], caches: Sequence[SequenceCache]) -> list[int]:
        """As :meth:`decode`, but the likeliest token of each sequence, chosen where the logits are."""
        ...
