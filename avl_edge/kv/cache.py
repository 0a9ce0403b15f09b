"""One sequence's tiered KV cache: what the policy decides, carried out on the pool's rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..config import KvShape, PromptShape
from ..request import ImageSpan
from .budget import KvPlan
from .layout import Format, smoothing_rows
from .methods import Method, PromptLayer, StepLayer, pruned
from .pool import Moved, RowPool, SequenceRows
from .pool.rows import Ids, Index
from .pool.sequence import LayerRows, Mask
from .selection import Selected, by_format

Scores = npt.NDArray[np.floating]

NO_SCORES: Scores = np.empty(0)


def prompt_shape(length: int, spans: Sequence[ImageSpan]) -> PromptShape:
    """Count the tokens of a prompt of ``length`` with its image ``spans``."""
    images = sum(span.length for span in spans)
    prefix = spans[0].start if spans else length
    return PromptShape(prefix, images, length - images - prefix)


@lru_cache(maxsize=256)
def _bytes_to_read(name: str, shape: KvShape) -> tuple[int, int]:
    """What a step reads of a row in a format, and of the basis that rows of it share."""
    format_ = Format(name)
    return format_.read_bytes(shape), format_.basis_rows_read * shape.row_bytes


class SequenceCache:
    """The rows of one sequence, and the policy that tiers them.

    Prefill: :meth:`store_prompt` and :meth:`prune_prompt` once per layer, in order. Decode, per step:
    :meth:`begin_step`, then per layer :meth:`rows_to_read` and :meth:`settle`; what is settled holds from the
    next step on. ``begin`` is the first token whose rows it takes itself: 0, but for a question over a shared prefix
    (:mod:`avl_edge.kv.shared_prefix`).
    """

    begin = 0

    def __init__(
        self,
        pool: RowPool,
        plan: KvPlan[Method],
        length: int,
        spans: Sequence[ImageSpan],
        layers: int,
        rows: SequenceRows | None = None,
    ) -> None:
        """``rows``: where they are not this sequence's alone. ``reach``: the most tokens that it may come to."""
        shape = prompt_shape(length, spans)
        self.policy = plan.method.policy(shape, layers)
        self.formats = plan.formats
        self.rows = rows or SequenceRows(pool, layers, plan.pages, plan.formats)
        self.length = length
        self.reach = plan.tokens
        self.step = 0
        self.refreshes = 0
        self.rows_read = 0
        self.rows_full = 0
        self.bytes_read = 0
        self.has_one_tier = plan.method.peak_tiers(shape, 0, layers).secondary == 0
        self._smooths_keys = rows is None and smoothing_rows(plan.formats) > 0
        self._evicted = [0] * layers
        nothing: tuple[object, ...] = (None,) * 4
        self._last_images: list[tuple[tuple[object, ...], list[Selected]]] = [(nothing, [])] * layers
        self._shape = pool.shape
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
            return np.arange(len(self.positions(layer)))
        return np.flatnonzero(self._is_suffix(layer))

    def positions(self, layer: int) -> Ids:  # noqa: ARG002
        """Those of the tokens still in ``layer`` of prefill: int32 ``[m]``, ascending."""
        return self._positions

    def is_image(self, layer: int) -> Mask:
        """Which of them are images', a mask ``[m]``."""
        return self._is_image[self.positions(layer)]

    @property
    def wants_distances(self) -> bool:
        """Whether :meth:`store_prompt` and :meth:`prune_prompt` need the distances of values."""
        return self.policy.wants_distances

    def store_prompt(self, layer: int, last: Scores, total: Scores, distances: Scores = NO_SCORES) -> list[Selected]:
        """Choose what ``layer`` stores of the tokens still in it, by their scores and distances (``[m]`` each, see
        :class:`~avl_edge.kv.methods.PromptLayer`).

        Returns, format by format, which of those ``m`` tokens are to be written, and where.
        """
        view = self._view(layer, last, total, distances)
        kept = self.policy.keep_prompt(view)
        for other, keep in kept.earlier.items():
            self.rows.keep_image(other, keep)
        image, text = kept.stored & view.is_image, kept.stored & ~view.is_image
        rows = self.rows.fill(
            layer,
            view.positions[text],
            view.positions[image],
            kept.core[image],
            self.length - int(kept.stored.sum()),
        )
        if self._smooths_keys:
            self.rows.take_smoothing(layer)
        return self._to_write(rows, np.concatenate([np.flatnonzero(image), np.flatnonzero(text)]))

    def _to_write(self, rows: LayerRows, order: Index) -> list[Selected]:
        """The rows of a layer that were taken for its prompt: all. ``order`` of the image rows, then of the text's."""
        return self._every_row(rows, order)

    def rows_before(self, layer: int) -> list[Selected]:  # noqa: ARG002
        """The rows that ``layer`` has of the tokens before ``begin``, format by format; ``order`` are in the order of
        their positions."""
        return []

    def _every_row(self, rows: LayerRows, order: Index) -> list[Selected]:
        """All rows of a layer, put together by their formats; ``order`` of the image rows, then of the text rows."""
        images = [each.at(order[each.order]) for each in self._image_rows(rows, secondary=True)]
        text = Selected(self.formats.text, order[len(rows.image_ids) :], rows.text_ids, rows.text_positions)
        return by_format(images, text)

    def _image_rows(self, rows: LayerRows, *, secondary: bool) -> list[Selected]:
        """A layer's core, with its ``secondary`` rows or without, by formats; ``order``: their indices among these."""
        formats, core, ids, positions = self.formats, rows.core, rows.image_ids, rows.image_positions
        if formats.core == formats.secondary:
            if not secondary:
                ids, positions = ids[core], positions[core]
            return [Selected(formats.core, np.arange(len(ids)), ids, positions)]
        if not secondary:
            count = np.count_nonzero(core)
            return [Selected(formats.core, np.arange(count), ids[core], positions[core])]
        tiers = ((formats.core, np.flatnonzero(core)), (formats.secondary, np.flatnonzero(~core)))
        return [Selected(name, at, ids[at], positions[at]) for name, at in tiers]

    def stored_images(self, stored: Sequence[Selected]) -> tuple[Index, Ids]:
        """Of the rows that :meth:`store_prompt` chose, the images': which of the ``m`` tokens, and their positions."""
        order = np.concatenate([each.order for each in stored])
        positions = np.concatenate([each.positions for each in stored])
        images = self._is_image[positions]
        return order[images], positions[images]

    def prune_prompt(self, layer: int, last: Scores, total: Scores, distances: Scores = NO_SCORES) -> Index | None:
        """Indices of the tokens that go on beyond ``layer``; None: all of them."""
        prune = self.policy.prunes(layer)
        if prune is None:
            return None
        survivors = np.flatnonzero(pruned(self._view(layer, last, total, distances), prune))
        self.go_on(survivors)
        return survivors

    def go_on(self, survivors: Index) -> None:
        """In the layers to come the prompt has only these of the tokens still in it, ascending: for a device that
        prunes by itself, as the policy's :meth:`~avl_edge.kv.methods.Policy.prunes` says."""
        self._positions = self._positions[survivors]

    def _view(self, layer: int, last: Scores, total: Scores, distances: Scores) -> PromptLayer:
        positions, is_image = self.positions(layer), self.is_image(layer)
        return PromptLayer(layer, positions, is_image, self._is_suffix(layer), last, total, distances)

    def _is_suffix(self, layer: int) -> Mask:
        return ~self.is_image(layer) & (self.positions(layer) >= self._first_image)

    def begin_step(self) -> tuple[int, Ids]:
        """Room for the next token: its position, and the row that it takes in each layer, in the text's format."""
        position = self.length + self.step
        self.step += 1
        self.refreshes += self.policy.reads_secondary(self.step)
        return position, self.rows.append(position)

    @property
    def picks_core(self) -> bool:
        """Whether :meth:`pick_core` comes before :meth:`rows_to_read` in every layer of this step."""
        return self.policy.picks_core(self.step)

    def rows_to_scan(self, layer: int) -> list[Selected]:
        """Those among which :meth:`pick_core` chooses: the stored image rows."""
        rows, name = self.rows.layers[layer], self.formats.core
        self.bytes_read += len(rows.image_ids) * Format(name).coarse_bytes(self._shape)
        return [Selected(name, np.arange(len(rows.image_ids)), rows.image_ids, rows.image_positions)]

    def pick_core(self, layer: int, weights: Scores) -> None:
        """Choose the core of this step by the coarse ``weights`` of the rows that were scanned."""
        self.set_core(layer, self.policy.pick_core(weights))

    @property
    def nucleus(self) -> tuple[float, int]:
        """How :meth:`pick_core` chooses, where a device does it: the share of the weight that is enough (1: as many
        rows as may be), and the most rows of a layer."""
        return self.policy.nucleus()

    def set_core(self, layer: int, core: Mask) -> None:
        """The core of this step as it was chosen: a mask over the rows that were scanned."""
        self.rows.set_core(layer, core)

    def text_rows(self, layer: int) -> Selected:
        """What this step attends in ``layer`` beside the core: text rows, with the new token's own last."""
        rows = self.rows.layers[layer]
        return Selected(self.formats.text, np.arange(len(rows.text_ids)), rows.text_ids, rows.text_positions)

    def rows_to_read(self, layer: int) -> list[Selected]:
        """The rows that this step attends in ``layer``, format by format: image rows, then text rows with the new
        token's own last; ``order`` counts in that sequence."""
        rows, images = self.rows.layers[layer], self._images_to_read(layer)
        count = sum(map(len, images))
        order = np.arange(count, count + len(rows.text_ids))
        selected = by_format(images, Selected(self.formats.text, order, rows.text_ids, rows.text_positions))
        self.rows_read += count + len(rows.text_ids)
        self.rows_full += self.length + self.step
        weights = [_bytes_to_read(each.format, self._shape) for each in selected]
        self.bytes_read += sum(len(each) * row for each, (row, _) in zip(selected, weights, strict=True))
        self.bytes_read += max(basis for _, basis in weights)
        self.bytes_read += self._shape.row_bytes * int(self.rows.smoothing[layer] >= 0)
        return selected

    def _images_to_read(self, layer: int) -> list[Selected]:
        """:meth:`_image_rows` of this step: most steps find them as the last one did."""
        rows, secondary = self.rows.layers[layer], self.policy.reads_secondary(self.step)
        source = (rows.image_ids, rows.core, secondary, self.formats)
        known, images = self._last_images[layer]
        if not all(one is other for one, other in zip(known, source, strict=True)):
            images = self._image_rows(rows, secondary=secondary)
            self._last_images[layer] = source, images
        return images

    @property
    def wants_scores(self) -> bool:
        """Whether this step's scores have to be given to :meth:`settle`."""
        return self.policy.wants_scores(self.step)

    def settle(self, layer: int, scores: Scores | None) -> list[Moved]:
        """Apply the policy to one layer after a step; the rows that change their format.

        ``scores`` as :meth:`rows_to_read` orders the rows; None where the policy does not want them.
        """
        rows = self.rows.layers[layer]
        scores = NO_SCORES if scores is None else scores
        texts = len(rows.text_ids)
        is_suffix: Mask = rows.text_positions >= self._first_image
        settled = self.policy.settle(StepLayer(layer, self.step, scores[:-texts], scores[-texts:], is_suffix))
        if settled.text is not None:
            self.rows.keep_text(layer, settled.text)
        core = settled.core
        if settled.image is not None:
            self.rows.keep_image(layer, settled.image)
            core = core if core is None else core[settled.image]
        return [] if core is None else self.rows.set_core(layer, core)

    @property
    def can_evict(self) -> bool:
        """Whether :meth:`evict` would free a row."""
        return any(self.policy.evictable(layer, rows.core) for layer, rows in enumerate(self.rows))

    def evict(self) -> int:
        """Between two steps, evict a quarter of each layer's secondary rows as they were at first; how many rows."""
        freed = 0
        for layer, rows in enumerate(self.rows):
            evictable = self.policy.evictable(layer, rows.core)
            count = min(evictable, -(-(evictable + self._evicted[layer]) // 4))
            if count:
                self.rows.keep_image(layer, self.policy.evict(layer, rows.core, count))
                self._evicted[layer] += count
                freed += count
        return freed

    def close(self) -> None:
        """Free all rows. Safe to call twice."""
        self.rows.close()
        self._last_images.clear()
