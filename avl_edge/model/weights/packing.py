"""Whole numbers of 4 and 8 bits in 32-bit words, and from there into the codes of :class:`Grouped`.

Words hold their numbers from the lowest bits up, and the machine is little-endian, as the files are: a word's bytes are
its numbers in order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..weight_format import GROUPS


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 ``[rows, n]`` to uint8 ``[rows, n * 32 / bits]``."""
    numbers = words.contiguous().view(torch.uint8)
    return numbers if bits == 8 else torch.stack([numbers & 15, numbers >> 4], -1).flatten(1)


def words(numbers: Tensor) -> Tensor:
    """uint8 ``[rows, n]`` to int32 ``[rows, n / 4]``, rounded up."""
    return functional.pad(numbers, (0, -numbers.shape[1] % 4)).view(torch.int32)


def nibbles(numbers: Tensor) -> Tensor:
    """uint8 ``[rows, n]``, each 0 to 15, to uint8 ``[rows, n / 2]``: number 2i in the low nibble of byte i."""
    return numbers[:, 0::2] | numbers[:, 1::2] << 4


def signed(numbers: Tensor) -> Tensor:
    """uint8 around 128 to int8 around 0."""
    return (numbers ^ 128).view(torch.int8)


def neighbours(group_of: Tensor, groups: int) -> Tensor | None:
    """The order of the inputs in which those of one group are neighbours, int64, from each input's group; None where
    they are so already. Raises ValueError unless each group has as many."""
    group = len(group_of) // groups
    numbers = group_of.long()
    if not bool(((numbers >= 0) & (numbers < groups)).all()):
        raise ValueError(f"names a group that is none of {groups}")
    if not bool((numbers.bincount(minlength=groups) == group).all()):
        raise ValueError(f"does not give {group} inputs to each of {groups} groups")
    order = numbers.argsort(stable=True)
    return None if bool((order[1:] > order[:-1]).all()) else order


def split_group(bits: int, group: int) -> int | None:
    """The largest group that 4-bit codes are held in and that divides ``group``, whose scale all of its parts share;
    of 8 bits, ``group``. None where there is none."""
    if bits == 8:
        return group
    return next((each for each in reversed(GROUPS) if group % each == 0), None)
