"""Keeping the memory of the libraries below torch bounded, so that a promise of bytes holds for the whole process."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path

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


def resident_bytes() -> int:
    """The memory that this process holds now, code of libraries included; 0 where the system does not tell."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    return 0


def advise_free(begin: int, end: int) -> int:
    """Tell the system that nobody reads the memory at the addresses ``begin .. end - 1`` again before writing to it.

    Returns the bytes of the whole pages in between, which are the system's again; 0 where it does not take them. Only
    for memory that this process has to itself.
    """
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if first >= last or advice is None or not sys.platform.startswith("linux"):  # elsewhere it may mean less
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return 0 if madvise(first, last - first, advice) else last - first
