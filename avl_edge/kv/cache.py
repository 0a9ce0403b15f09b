"""One sequence's tiered KV cache: what the policy decides, carried out on the pool's rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..config import KvShape, PromptShape
from ..request import ImageSpan, RopePositions
from .books import Ids, Index, Mask
from .budget import KvPlan
from .layout import Format, smoothing_rows
from .methods import Method, NoScores, PromptLayer, Step, pruned
from .pool import Moved, RowPool, SequenceRows
from .pool.sequence import LayerRows
from .selection import Selected, Selection, StepScores, by_format

Scores = npt.NDArray[np.floating]

NO_SCORES: Scores = np.empty(0)


def prompt_shape(length: int, spans: Sequence[ImageSpan]) -> PromptShape:
    """Count the tokens of a prompt of ``length`` with its image ``spans``."""
    images = sum(span.length for span in spans)
    prefix = spans[0].start if spans else length
    places = tuple((span.start, span.length) for span in spans) if len(spans) > 1 else ()
    return PromptShape(prefix, images, length - images - prefix, places)


@lru_cache(maxsize=256)
def _bytes_to_read(name: str, shape: KvShape) -> tuple[int, int]:
    """What a step reads of a row in a format, and of the basis that rows of it share."""
    format_ = Format(name)
    return format_.read_bytes(shape), format_.basis_rows_read * shape.row_bytes


class SequenceCache:
    """The rows of one sequence, and the policy that tiers them.

    Prefill: :meth:`store_prompt` and :meth:`prune_prompt` once per layer, in order. Decode, per step:
    :meth:`begin_step`, :attr:`rows_read_now` and :meth:`settle`; what is settled holds from the next step on, and what
    a step read is counted where it is settled. ``begin`` is the first token whose rows it takes itself: 0, but for a
    question over a shared prefix (:mod:`avl_edge.kv.shared_prefix`).
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
        rope: RopePositions | None = None,
    ) -> None:
        """``rows``: where they are not this sequence's alone. ``rope``: of the prompt's tokens, where their RoPE
        positions are not their places."""
        shape = prompt_shape(length, spans)
        self.policy = plan.method.policy(shape, layers)
        self.formats = plan.formats
        self.rows = rows or SequenceRows(pool, layers, plan.pages, plan.formats)
        self.length = length
        self._rope = rope
        self.rope_delta = rope.next - length if rope else 0
        self._most_tokens = plan.tokens
        self.step = 0
        self.refreshes = 0
        self.rows_read = 0
        self.rows_full = 0
        self.bytes_read = 0
        self.has_one_tier = plan.method.peak_tiers(shape, 0, layers).secondary == 0
        self._smooths_keys = rows is None and smoothing_rows(plan.formats) > 0
        self._evicted = [0] * layers
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

    def coordinates(self, positions: Ids) -> Ids:
        """The RoPE positions of the tokens at ``positions`` ``[m]`` of this sequence: int32 ``[m]``, or ``[axes, m]``
        where those of the prompt's tokens are not their places."""
        if self._rope is None:
            return positions
        prompt = self._rope.coordinates
        in_prompt = np.minimum(positions, self.length - 1)
        return np.where(positions < self.length, prompt[:, in_prompt], positions + self.rope_delta).astype(np.int32)

    @property
    def reach(self) -> int:
        """RoPE's positions are below this, how ever long the answer may become."""
        return self._most_tokens + self.rope_delta

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
            self.rows.keep_image(keep[None], other)
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
        formats, core, ids, positions = self.formats, rows.core, rows.image_ids, rows.image_positions
        of_images, of_text = order[: len(ids)], order[len(ids) :]
        tiers = [(formats.core, core), (formats.secondary, ~core)]
        if formats.core == formats.secondary:
            tiers = [(formats.core, np.ones_like(core))]
        images = [Selected(name, of_images[tier], ids[tier], positions[tier]) for name, tier in tiers]
        return by_format(images, Selected(formats.text, of_text, rows.text_ids, rows.text_positions))

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
        """Room for the next token: its RoPE position, and the row that it takes in each layer, in the text's format."""
        position = self.length + self.step
        self.step += 1
        self.refreshes += self.policy.reads_secondary(self.step)
        return position + self.rope_delta, self.rows.append(position)

    @property
    def picks_core(self) -> bool:
        """Whether :meth:`pick_core` comes before :meth:`rows_to_read` in every layer of this step."""
        return self.policy.picks_core(self.step)

    @property
    def rows_scanned_now(self) -> Selection:
        """Those among which :meth:`pick_core` and :meth:`set_core` choose: the stored image rows."""
        return Selection(self.formats.core, self.rows.image)

    def pick_core(self, layer: int, weights: Scores) -> None:
        """Choose the core of this step by the coarse ``weights`` of the rows that were scanned."""
        self.set_core(self.policy.pick_core(weights)[None], layer)

    @property
    def nucleus(self) -> tuple[float, int]:
        """How :meth:`pick_core` chooses, where a device does it: the share of the weight that is enough (1: as many
        rows as may be), and the most rows of a layer."""
        return self.policy.nucleus()

    def set_core(self, core: Mask, first: int = 0) -> None:
        """The core of this step as it was chosen: masks ``[k, n]`` over the rows that were scanned of the k layers from
        ``first`` on."""
        self.rows.set_core(core, first)

    @property
    def text_rows(self) -> Selection:
        """What this step attends beside the core: text rows, with the new token's own last."""
        return Selection(self.formats.text, self.rows.text)

    @property
    def rows_read_now(self) -> list[Selection]:
        """The rows that this step attends: image rows, those of the core or of each tier, then text rows with the new
        token's own last."""
        formats, image = self.formats, self.rows.image
        if not self.policy.reads_secondary(self.step):
            images = [Selection(formats.core, image, None if image.core_total == image.total else True)]
        elif formats.core == formats.secondary:
            images = [Selection(formats.core, image)]
        else:
            images = [Selection(formats.core, image, True), Selection(formats.secondary, image, False)]
        return [*images, self.text_rows]

    def rows_to_read(self, layer: int) -> list[Selected]:
        """:attr:`rows_read_now` of one layer, put together by their formats; ``order`` counts in that sequence, image
        rows of both tiers by their positions."""
        *images, text = (each.of(layer) for each in self.rows_read_now)
        count = sum(map(len, images))
        if len(images) == 1:
            images = [images[0].at(np.arange(count))]
        return by_format(images, text.at(count + text.order))

    @property
    def wants_scores(self) -> bool:
        """Whether this step's scores have to be given to :meth:`settle`."""
        return self.policy.wants_scores(self.step)

    def settle(self, scores: StepScores | None) -> list[Moved]:
        """End a step: count what it read, and apply the policy to all layers; the rows that change their format.

        ``scores`` of :attr:`rows_read_now`; None where the policy does not want them.
        """
        self._count()
        settled, rows = self.policy.settle_step(self._step(scores)), self.rows
        core = settled.core
        if core is not None and settled.image is not None:
            core = _within(settled.image, core, rows.image.counts)
        if settled.text is not None:
            rows.keep_text(settled.text)
        if settled.image is not None:
            rows.keep_image(settled.image)
        return [] if core is None else rows.set_core(core)

    def _step(self, scores: StepScores | None) -> Step:
        """The step that ends, as the policy sees it."""
        text, image = self.rows.text, self.rows.image
        of_rows = NoScores(len(self.rows.layers)) if scores is None else scores
        return Step(self.step, of_rows, text.positions, self._first_image, image.core, text.counts, image.counts)

    def _count(self) -> None:
        """Add up what the step that ends has read."""
        bases = []
        for each in self.rows_read_now:
            row, basis = _bytes_to_read(each.format, self._shape)
            self.rows_read += each.total
            self.bytes_read += each.total * row
            if basis:
                bases.append(basis * (each.counts > 0))
        self.rows_full += len(self.rows.layers) * (self.length + self.step)
        self.bytes_read += int(np.max(bases, axis=0).sum()) if bases else 0
        self.bytes_read += np.count_nonzero(self.rows.smoothing >= 0) * self._shape.row_bytes
        if self.picks_core:
            scanned = self.rows_scanned_now
            self.bytes_read += scanned.total * Format(scanned.format).coarse_bytes(self._shape)

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
                self.rows.keep_image(self.policy.evict(layer, rows.core, count)[None], layer)
                self._evicted[layer] += count
                freed += count
        return freed

    def close(self) -> None:
        """Free all rows. Safe to call twice."""
        self.rows.close()


def _within(keep: Mask, core: Mask, counts: Ids) -> Mask:
    """What ``core`` says of the rows in ``keep``, side by side; ``[L, n]`` each."""
    found = np.zeros_like(core)
    for layer, count in enumerate(counts.tolist()):
        kept = core[layer, :count][keep[layer, :count]]
        found[layer, : len(kept)] = kept
    return found
