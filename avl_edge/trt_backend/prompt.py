"""A prompt's run: what the decoder's engine is given, and its outputs as the cache's policy wants them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache import SequenceCache
from ..export import bindings as names
from ..policies import Prune
from ..pool import RowStore
from ..request import Prompt
from ..spec import TextSpec
from .engines import Buffers, Engines, pool_dims, pool_of

Scores = npt.NDArray[np.float32]


class PrunedAfter(NamedTuple):
    """The layer after which image tokens end, and how many go on."""

    layer: int
    prune: Prune


def pruned_after(cache: SequenceCache, layers: int) -> PrunedAfter | None:
    """Where the cache's policy prunes, before the last layer; at one layer at most, as the engine does."""
    found = [PrunedAfter(layer, prune) for layer in range(layers - 1) if (prune := cache.policy.prunes(layer))]
    assert len(found) <= 1, "a package prunes after one layer"
    return found[0] if found else None


def buffers(
    engines: Engines, store: RowStore, prompt: Prompt, features: Tensor | None, cache: SequenceCache
) -> Buffers:
    """Memory for the run of a whole prompt, its inputs filled in. Its outputs hold all layers' keys and values."""
    assert cache.begin == 0, "engines serve no scenes"
    text, device, length = engines.spec.text, store.keys.device, len(prompt)
    flat = torch.zeros(1, text.hidden_size, dtype=store.keys.dtype, device=device)
    if features is not None:
        flat = features.reshape(-1, text.hidden_size)
    is_image = cache.is_image(0)
    pruned = pruned_after(cache, text.layers)
    survivors = length if pruned is None else length - int(is_image.sum()) + pruned.prune.images
    queries = _queries(cache, text.layers)

    def table(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    given = {
        names.TOKEN_IDS: table(prompt.token_ids),
        names.FEATURES: flat,
        names.FEATURE_ROWS: table(np.where(is_image, np.cumsum(is_image) - 1, -1)),
        names.POSITIONS: table(np.arange(length)),
        names.TOKEN_OFFSETS: table([0, length]),
        names.SLOTS: torch.full((text.layers, length), -1, dtype=torch.int32, device=device),
        names.ROWS: torch.zeros(text.layers, 1, dtype=torch.int32, device=device),
        names.ROW_OFFSETS: torch.zeros(text.layers, 2, dtype=torch.int32, device=device),
        names.SCORE_QUERIES: table(queries),
        names.PINNED: table(~is_image),
        **pool_of(store),
    }
    dims = {
        **pool_dims(store),
        "T": length,
        "P * T": length,
        "F": len(flat),
        "B": 1,
        "B + 1": 2,
        "P * B + 1": 2,
        "N": 1,
        "W": len(queries),
        "M": survivors,
        names.SURVIVORS: survivors,
    }
    bindings = engines.decoder_bindings
    taken = [each for each in (*bindings.inputs, *bindings.outputs) if each.name != names.SURVIVORS]
    return Buffers(taken, dims, device, given)


def _queries(cache: SequenceCache, layers: int) -> list[int]:
    """The tokens whose attention the engine sums, the same in all layers; none where no policy looks at any scores."""
    asked = [queries for layer in range(layers) if (queries := cache.prompt_queries(layer)) is not None]
    summed = max(asked, key=len, default=np.empty(0, dtype=np.int64))
    assert all(len(queries) == 0 or np.array_equal(queries, summed) for queries in asked), "layers ask different things"
    return summed.tolist() if len(summed) else [-1] if asked else []  # -1 is nobody: only the last token's are wanted


def scores_of(run: Buffers, text: TextSpec, cache: SequenceCache) -> list[tuple[Scores, Scores]]:
    """Each layer's last and total attention ``[m]``, on the host: zero for what the policy did not ask for."""
    tokens = [run[names.TOKEN_SCORES.format(layer)] for layer in range(text.layers)]
    # One copy for all layers.
    flat = torch.cat([each.flatten() for each in tokens]).cpu().numpy()
    split = np.split(flat, np.cumsum([each.numel() for each in tokens])[:-1])
    scores = []
    for layer, each in enumerate(split):
        last, total = each.reshape(2, -1)
        queries = cache.prompt_queries(layer)
        last = np.zeros_like(last) if queries is None else last
        scores.append((last, np.zeros_like(total) if queries is None or not len(queries) else total))
    return scores
