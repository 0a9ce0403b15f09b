"""One sequence's tiered KV cache: what the policy decides, carried out on the pool's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .budget import KvPlan
from .config import PromptShape
from .layout import Format
from .policies import Method, PromptLayer, StepLayer, pruned
from .pool import Moved, RowPool, SequenceRows
from .pool.rows import Ids
from .pool.sequence import LayerRows, Mask
from .request import ImageSpan

Index = npt.NDArray[np.int64]
Scores = npt.NDArray[np.floating]

_NO_SCORES: Scores = np.empty(0)


def prompt_shape(length: int, spans: Sequence[ImageSpan]) -> PromptShape:
    """Count the tokens of a prompt of ``length`` with its image ``spans``."""
    images = sum(span.length for span in spans)
    prefix = spans[0].start if spans else length
    return PromptShape(prefix, images, length - images - prefix)


@dataclass(frozen=True)
class Selected:
    """Rows of one format. ``places`` int64: where they stand among all that are meant (tokens, or rows to read);
    ``ids`` int32: where they lie in the pool; ``positions`` int32: those of their tokens."""

    format: str
    places: Index
    ids: Ids
    positions: Ids


def is_low_rank(selected: Selected) -> bool:
    """Whether the rows are read over their layer's basis."""
    return Format(selected.format).rank is not None


class SequenceCache:
    """The rows of one sequence, and the policy that tiers them.

    Prefill: :meth:`store_prompt` and :meth:`prune_prompt` once per layer, in order. Decode, per step:
    :meth:`begin_step`, then per layer :meth:`rows_to_read` and :meth:`settle`; what is settled holds from the
    next step on. ``begin`` is the first token whose rows it takes itself: 0, but for a question about a scene
    (:mod:`avl_edge.shared`).
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
        """``rows``: where they are not this sequence's alone."""
        shape = prompt_shape(length, spans)
        self.policy = plan.method.policy(shape, layers)
        self.formats = plan.formats
        self.rows = rows or SequenceRows(pool, layers, plan.pages, plan.formats)
        self.length = length
        self.step = 0
        self.refreshes = 0
        self.rows_read = 0
        self.rows_full = 0
        self.bytes_read = 0
        self.has_one_tier = plan.method.peak_tiers(shape, 0, layers).secondary == 0
        self._spared = [0] * layers
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

    def store_prompt(self, layer: int, last: Scores, total: Scores, distances: Scores = _NO_SCORES) -> list[Selected]:
        """Choose what ``layer`` stores of the tokens still in it, by their scores and distances (``[m]`` each, see
        :class:`~avl_edge.policies.PromptLayer`).

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
        return self._to_write(rows, np.concatenate([np.flatnonzero(image), np.flatnonzero(text)]))

    def _to_write(self, rows: LayerRows, places: Index) -> list[Selected]:
        """The rows of a layer that were taken for its prompt: all. ``places`` of the image rows, then of the text's."""
        return self._by_format(rows, np.ones(len(rows.core), dtype=np.bool_), places)

    def rows_before(self, layer: int) -> list[Selected]:  # noqa: ARG002
        """The rows that ``layer`` has of the tokens before ``begin``, format by format; ``places`` are in the order of
        their positions."""
        return []

    def _by_format(self, rows: LayerRows, image: Mask, places: Index) -> list[Selected]:
        """The image rows that ``image`` marks and all text rows of a layer, put together by their formats.

        ``places`` of the marked image rows, then of the text rows.
        """
        formats, count = self.formats, int(image.sum())
        ids = np.concatenate([rows.image_ids[image], rows.text_ids])
        positions = np.concatenate([rows.image_positions[image], rows.text_positions])
        if formats.text == formats.core == formats.secondary:
            return [Selected(formats.text, places, ids, positions)]
        names = np.full(len(ids), formats.text, dtype=object)
        names[:count] = np.where(rows.core[image], formats.core, formats.secondary)
        chosen = [(name, np.flatnonzero(names == name)) for name in dict.fromkeys(formats.by_tier().values())]
        return [Selected(name, places[at], ids[at], positions[at]) for name, at in chosen if len(at)]

    def stored_images(self, stored: Sequence[Selected]) -> tuple[Index, Ids]:
        """Of the rows that :meth:`store_prompt` chose, the images': which of the ``m`` tokens, and their positions."""
        places = np.concatenate([each.places for each in stored])
        positions = np.concatenate([each.positions for each in stored])
        images = self._is_image[positions]
        return places[images], positions[images]

    def prune_prompt(self, layer: int, last: Scores, total: Scores, distances: Scores = _NO_SCORES) -> Index | None:
        """Indices of the tokens that go on beyond ``layer``; None: all of them."""
        prune = self.policy.prunes(layer)
        if prune is None:
            return None
        survivors = np.flatnonzero(pruned(self._view(layer, last, total, distances), prune))
        self.go_on(survivors)
        return survivors

    def go_on(self, survivors: Index) -> None:
        """In the layers to come the prompt has only these of the tokens still in it, ascending: for a device that
        prunes by itself, as the policy's :meth:`~avl_edge.policies.Policy.prunes` says."""
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

    def rows_to_look_at(self, layer: int) -> list[Selected]:
        """Those among which :meth:`pick_core` chooses: the stored image rows."""
        rows, name = self.rows.layers[layer], self.formats.core
        self.bytes_read += len(rows.image_ids) * Format(name).coarse_bytes(self._shape)
        return [Selected(name, np.arange(len(rows.image_ids)), rows.image_ids, rows.image_positions)]

    def pick_core(self, layer: int, weights: Scores) -> None:
        """Choose the core of this step by the coarse ``weights`` of the rows that were looked at."""
        self.set_core(layer, self.policy.pick_core(weights))

    @property
    def nucleus(self) -> tuple[float, int]:
        """How :meth:`pick_core` chooses, where a device does it: the share of the weight that is enough (1: as many
        rows as may be), and the most rows of a layer."""
        return self.policy.nucleus()

    def set_core(self, layer: int, core: Mask) -> None:
        """The core of this step as it was chosen: a mask over the rows that were looked at."""
        self.rows.set_core(layer, core)

    def text_rows(self, layer: int) -> Selected:
        """What this step attends in ``layer`` beside the core: text rows, with the new token's own last."""
        rows = self.rows.layers[layer]
        return Selected(self.formats.text, np.arange(len(rows.text_ids)), rows.text_ids, rows.text_positions)

    def rows_to_read(self, layer: int) -> list[Selected]:
        """The rows that this step attends in ``layer``, format by format: image rows, then text rows with the new
        token's own last; ``places`` are in that order."""
        rows = self.rows.layers[layer]
        image = rows.core | self.policy.reads_secondary(self.step)
        count = int(image.sum()) + len(rows.text_ids)
        selected = self._by_format(rows, image, np.arange(count))
        self.rows_read += count
        self.rows_full += self.length + self.step
        formats = [Format(each.format) for each in selected]
        pairs = zip(selected, formats, strict=True)
        self.bytes_read += sum(len(each.ids) * format_.read_bytes(self._shape) for each, format_ in pairs)
        self.bytes_read += max(format_.basis_rows_read for format_ in formats) * self._shape.row_bytes
        return selected

    @property
    def wants_scores(self) -> bool:
        """Whether this step's scores have to be given to :meth:`settle`."""
        return self.policy.wants_scores(self.step)

    def settle(self, layer: int, scores: Scores | None) -> list[Moved]:
        """Apply the policy to one layer after a step; the rows that change their format.

        ``scores`` in the order of :meth:`rows_to_read`'s places; None where the policy does not want them.
        """
        rows = self.rows.layers[layer]
        scores = _NO_SCORES if scores is None else scores
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
    def can_spare(self) -> bool:
        """Whether :meth:`give_up` would free a row."""
        return any(self.policy.spare(layer, rows.core) for layer, rows in enumerate(self.rows))

    def give_up(self) -> int:
        """Between two steps, evict a quarter of each layer's secondary rows as they were at first; how many rows."""
        freed = 0
        for layer, rows in enumerate(self.rows):
            spare = self.policy.spare(layer, rows.core)
            count = min(spare, -(-(spare + self._spared[layer]) // 4))
            if count:
                self.rows.keep_image(layer, self.policy.give_up(layer, rows.core, count))
                self._spared[layer] += count
                freed += count
        return freed

    def close(self) -> None:
        """Free all rows. Safe to call twice."""
        self.rows.close()
