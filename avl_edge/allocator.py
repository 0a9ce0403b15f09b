"""Keeping the memory of the libraries below torch bounded, so that a promise of bytes holds for the whole process."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_MMAP_THRESHOLD = -3  # mallopt's parameter, from glibc's malloc.h
_LARGE = 1 << 20
_KERNELS = "16"


def bound() -> None:
    """To be called once, before the first tensor is computed. What the user set in the environment stays.

    torch and oneDNN keep the compiled kernels of every length of a prompt, 1024 by default, which grows by megabytes
    a prompt; both take a limit from the environment alone. glibc keeps freed blocks of up to 32 MB in its heap once it
    has seen one go: with a fixed threshold a large tensor's memory goes back to the system as soon as it is freed.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KERNELS)
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
