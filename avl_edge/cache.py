"""One sequence's tiered KV cache: what the policy decides, carried out on the pool's rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .config import PromptShape
from .policies import Method, PromptLayer, StepLayer
from .pool import RowPool, SequenceRows
from .pool.rows import Ids, Mask
from .request import ImageSpan

Index = npt.NDArray[np.int64]

_NO_SCORES: npt.NDArray[np.floating] = np.empty(0)


def prompt_shape(length: int, spans: Sequence[ImageSpan]) -> PromptShape:
    """Count the tokens of a prompt of ``length`` with its image ``spans``."""
    images = sum(span.length for span in spans)
    prefix = spans[0].start if spans else length
    return PromptShape(prefix, images, length - images - prefix)


class SequenceCache:
    """The rows of one sequence, and the policy that tiers them.

    Prefill: :meth:`store_prompt` and :meth:`prune_prompt` once per layer, in order. Decode, per step:
    :meth:`begin_step`, then per layer :meth:`ids_to_read` and :meth:`settle`; what is settled holds from the
    next step on.
    """

    def __init__(
        self, pool: RowPool, method: Method, length: int, spans: Sequence[ImageSpan], layers: int, limit: int
    ) -> None:
        shape = prompt_shape(length, spans)
        self.policy = method.policy(shape, layers)
        self.rows = SequenceRows(pool, layers, limit)
        self.length = length
        self.step = 0
        self.refreshes = 0
        self.rows_read = 0
        self.rows_full = 0
        self._first_image = shape.prefix
        self._is_image = np.zeros(length, dtype=np.bool_)
        for span in spans:
            self._is_image[span.start : span.start + span.length] = True
        self._positions = np.arange(length, dtype=np.int32)

    def prompt_queries(self, layer: int) -> Index | None:
        """The queries whose attention is summed in ``layer``: int64 indices into the tokens still in it.

        None: the policy asks for no scores at all, the last query's neither.
        """
        queries = self.policy.prompt_queries(layer)
        if queries == "none":
            return None
        if queries == "last":
            return np.empty(0, dtype=np.int64)
        if queries == "all":
            return np.arange(len(self._positions))
        return np.flatnonzero(self._is_suffix())

    def store_prompt(
        self, layer: int, last: npt.NDArray[np.floating], total: npt.NDArray[np.floating]
    ) -> tuple[Index, Index]:
        """Choose what ``layer`` stores of the tokens still in it, by their scores (``[m]`` each).

        Returns int64 indices into those ``m`` tokens, and the row ids that they go to.
        """
        view = self._view(layer, last, total)
        kept = self.policy.keep_prompt(view)
        image, text = kept.stored & view.is_image, kept.stored & ~view.is_image
        text_ids, image_ids = self.rows.fill(
            layer,
            view.positions[text],
            view.positions[image],
            kept.core[image],
            self.length - int(kept.stored.sum()),
        )
        index = np.concatenate([np.flatnonzero(text), np.flatnonzero(image)])
        return index, np.concatenate([text_ids, image_ids]).astype(np.int64)

    def prune_prompt(self, layer: int, last: npt.NDArray[np.floating], total: npt.NDArray[np.floating]) -> Index | None:
        """Indices of the tokens that go on beyond ``layer``; None: all of them."""
        keep = self.policy.prune_prompt(self._view(layer, last, total))
        if keep is None:
            return None
        self._positions = self._positions[keep]
        return np.flatnonzero(keep)

    def _view(self, layer: int, last: npt.NDArray[np.floating], total: npt.NDArray[np.floating]) -> PromptLayer:
        return PromptLayer(layer, self._positions, self._is_image[self._positions], self._is_suffix(), last, total)

    def _is_suffix(self) -> Mask:
        return ~self._is_image[self._positions] & (self._positions >= self._first_image)

    def begin_step(self) -> tuple[int, Index]:
        """Room for the next token: its position, and the row id that it takes in each layer (int64)."""
        position = self.length + self.step
        self.step += 1
        self.refreshes += self.policy.reads_secondary(self.step)
        return position, self.rows.append(position).astype(np.int64)

    def ids_to_read(self, layer: int) -> Ids:
        """The rows that this step attends in ``layer``, the new token's own included (int32)."""
        ids = self.rows.layers[layer].ids_to_read(self.policy.reads_secondary(self.step))
        self.rows_read += len(ids)
        self.rows_full += self.length + self.step
        return ids

    @property
    def wants_scores(self) -> bool:
        """Whether this step's scores have to be given to :meth:`settle`."""
        return self.policy.wants_scores(self.step)

    def settle(self, layer: int, scores: npt.NDArray[np.floating] | None) -> None:
        """Apply the policy to one layer after a step.

        ``scores`` in the order of :meth:`ids_to_read`; None where the policy does not want them.
        """
        rows = self.rows.layers[layer]
        scores = _NO_SCORES if scores is None else scores
        texts = len(rows.text_ids)
        is_suffix: Mask = rows.text_positions >= self._first_image
        settled = self.policy.settle(StepLayer(layer, self.step, scores[:-texts], scores[-texts:], is_suffix))
        if settled.core is not None:
            self.rows.set_core(layer, settled.core)
        if settled.image is not None:
            self.rows.keep_image(layer, settled.image)
        if settled.text is not None:
            self.rows.keep_text(layer, settled.text)

    def close(self) -> None:
        """Free all rows. Safe to call twice."""
        self.rows.close()
