"""The native library: where it is, what its functions take, and what to do when it is not there.

`pip install` builds plugins/cpu/core_attention.cpp into avl_edge/attention/_core_attention.*, a shared library with a C
interface that ctypes loads; it is no Python module. Without it the package works, only slower, by gathering rows in
torch; the first use then warns, once, with the reason and the cure.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# The library takes its OpenMP runtime from the process instead of bringing one, and torch is what loads it: imported
# first, both run on the same threads.
import torch  # noqa: F401

MAPS = Path("/proc/self/maps")
"""The files that this process has mapped, OpenMP runtimes among them; Linux alone has it."""
DIRECTORY = Path(__file__).resolve().parent
"""Where the library is built."""

# The structures of plugins/cpu/step.h, which says what their fields mean. Packed, since that is one call into Python
# where a ctypes structure is one for each field.
CALL = struct.Struct("3P7if")
"""The addresses of query, out and scores, 0 for none; parts, batch, heads, kv heads, head size, a number of FORMATS,
threads; scale."""
PART = struct.Struct("4P6q2i")
"""The addresses of keys, values, rows and offsets; the strides of a row's and of a head's keys, then of its values;
id limit, listed ids; the numbers of FORMATS of keys and of values."""
INTERFACE = 2
"""That of the library which these structures, and those of :mod:`avl_edge.attention.decoder`, belong to."""
FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "coarse int8": 5}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """None, after one warning, when it is missing or cannot be loaded."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := DIRECTORY / f"_core_attention{suffix}").is_file()]
    try:
        if not found:
            raise OSError("the library was not built")
        _share_openmp()
        loaded = ctypes.CDLL(str(found[0]), use_errno=True)
        loaded.avl_attend.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
        if not hasattr(loaded, "avl_interface") or loaded.avl_interface() != INTERFACE:
            raise OSError("it was built from another version of the source")
    except OSError as error:
        warnings.warn(
            f"Decoding is slower than it could be, because the native attention kernel is missing ({error}): install "
            "g++ or clang, then avl-edge once more from its source, with `pip install --force-reinstall --no-deps .`.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    loaded.avl_attend.restype = ctypes.c_int32
    loaded.avl_decoder_close.argtypes = (ctypes.c_void_p,)
    loaded.avl_decoder_open.restype = ctypes.c_void_p
    return loaded


def core_attention() -> Callable[[bytes, bytes], int] | None:
    """The C function `avl_attend`, of a CALL and its PARTs, each packed, in this order; it returns 0, EINVAL for
    offsets or ERANGE for row ids that do not fit, or ENOMEM. None where there is no :func:`library`."""
    loaded = library()
    return None if loaded is None else loaded.avl_attend


def _share_openmp() -> None:
    """Let libraries that are loaded from now on find torch's OpenMP runtime; builds of torch for Arm keep it apart."""
    runtime = openmp_runtime(os.fsdecode(MAPS.read_bytes())) if MAPS.is_file() else None  # names are any bytes
    if runtime:
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)


def openmp_runtime(maps: str) -> str | None:
    """The file of the OpenMP runtime among the mapped ones of a process (proc_pid_maps(5)), torch's before others."""
    found = dict.fromkeys(re.findall(r"(/\S.*/lib(?:gomp|iomp5|omp)\b[^/\n]*\.so[^/\n]*)$", maps, re.MULTILINE))
    return min(found, key=lambda path: "/torch" not in path, default=None)


def available() -> bool:
    """Whether decode attention runs natively, for CPU tensors of every format but float64."""
    return core_attention() is not None
