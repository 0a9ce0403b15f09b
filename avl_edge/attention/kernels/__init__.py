"""Attention over pool rows: the decode step that reads selected rows where they lie, and the prompt.

A pool holds one layer's keys and values as rows, [R, H_kv, d] each, or as records of a packed format in an arena of
bytes; a sequence is a list of row ids. Shapes use B for sequences, H for query heads, H_kv for key/value heads (query
head h reads key/value head h // (H // H_kv)), d for the head size and n for the prompt's tokens. Arithmetic is in
float32 for every dtype but float64, which stays float64. Nothing here is meant for gradients.
"""

from .parts import Part
from .prompt import attend_prompt, prompt_scores, value_distances
from .reference import attend_parts_reference, attend_reference, coarse_weights_reference
from .selected import attend, attend_parts, coarse_weights

__all__ = [
    "Part",
    "attend",
    "attend_parts",
    "attend_parts_reference",
    "attend_prompt",
    "attend_reference",
    "coarse_weights",
    "coarse_weights_reference",
    "prompt_scores",
    "value_distances",
]
